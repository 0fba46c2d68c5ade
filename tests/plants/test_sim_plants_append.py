"""Run the planted bugs of the kernel that appends to a cache; see test_sim_plants.py."""

from __future__ import annotations

import pytest
from append_calls import CASES, check, make_call
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.isolate.registry import find_plant
from flashcore.kernels.append.params import AppendPlan
from flashcore.sim.plants import index
from flashcore.sim.plants.append import PLANTS_APPEND
from flashcore.sim.report import SimulationError

pytestmark = pytest.mark.thorough

SHOWN_BY = {
    "append-no-room": "one token, pages of 8",
    "append-any-page": "a wild table",
    "append-length-unclamped": "one token, pages of 8",
    "append-position-unclamped": "offsets",
    "append-rows-of-no-sequence": "packed, rows of no sequence",
    "append-late-end": "packed",
    "append-wrong-sign": "halves turn",
    "append-neighbours-turn": "a part of halves turns",
    "append-rest-left": "contiguous, heads third",
    "append-values-as-keys": "contiguous, heads third",
    "append-stale-length": "one token, pages of 8",
    "append-first-query": "more new tokens than queries",
    "append-page-of-the-first": "one token, pages of 8",
    "append-place-in-sequence": "one token, pages of 8",
    "append-at-the-front": "one token, pages of 8",
    "append-scale-of-the-first": "8 bits, scales of sequences and heads",
    "append-values-scaled-as-keys": "8 bits, a prompt",
    "append-turned-cut-off": "bfloat16",
    "append-early": "one token, pages of 8",
    "append-any-address": "addresses between packets",
    "append-any-row": "halves turn",
    "append-heads-even": "an odd number of heads",
    "append-last-way-lost": "packed, many sequences",
    "append-overflow-is-nan": "8 bits, a scale of all",
    "append-ties-away": "8 bits, a scale of all",
    "append-nan-is-largest": "8 bits, a scale of all",
    "append-subnormals-lost": "8 bits, a scale of all",
    "append-scale-multiplies": "8 bits, a scale of all",
    "append-quotient-of-product": "8 bits, all values",
    "append-quotient-of-inf": "8 bits, wild scales",
}


def found(name: str, seed: int, healthy: bool = False) -> str:
    """Return what finds a plant: an alarm's kind, or "wrong-result", or "healthy"."""
    try:
        check(make_call(CASES[SHOWN_BY[name]]), None if healthy else PLANTS_APPEND[name], seed)
    except SimulationError as error:
        return error.kind
    except AssertionError:
        return "wrong-result"
    return "healthy"


@pytest.mark.parametrize("name", PLANTS_APPEND)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS_APPEND[name]
    for seed in seeds_of(plant):
        assert found(name, seed) in (plant.caught_by, *plant.or_by), f"seed {seed}"


@pytest.mark.parametrize("name", ["append-no-room", "append-late-end", "append-wrong-sign"])
def test_without_a_plant_the_same_runs_are_healthy(name: str) -> None:
    assert {found(name, seed, healthy=True) for seed in SOME_SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS_APPEND)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS_APPEND[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(PLANTS_APPEND) == []


def test_isolate_says_that_it_does_not_take_the_kernel_apart() -> None:
    assert index.kernels_of("append-no-room") == [AppendPlan.kernel]
    with pytest.raises(ValueError, match=r"append-no-room.*append_kvcache.*test_sim_plants_append"):
        find_plant("append-no-room", "sim")
