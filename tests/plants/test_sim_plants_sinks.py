"""Run the planted bugs of sinks on both kernels; see test_sim_plants.py."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import Inputs, make_inputs
from flashcore.checks.planned import with_fields
from flashcore.compile.codegen import generate_source
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH, Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.sinks import PLANTS_SINKS, PLANTS_SINKS_SPLIT

pytestmark = pytest.mark.thorough

PLANTS = PLANTS_SINKS | PLANTS_SINKS_SPLIT
# Heads of a group are rows of one row tile, which they do not fill.
CASE = Case(seqlen_q=9, seqlen_k=70, num_heads_q=4, num_heads_kv=2, head_dim=32, head_dim_v=32,
            sinks=True)  # fmt: skip
# Architecture and tile: keys shared by blocks or not, and shared by warpgroups besides.
TILES: dict[str, tuple[int, dict[str, Any]]] = {
    "wmma": (SIM_ARCH, {}),
    "sm90": (90, {"block_m": 64, "block_n": 32, "key_slices": 2, "num_stages": 4}),
    "split": (90, {"block_m": 64, "block_n": 32, "num_splits": 3}),
}
CAUGHT = [
    *((tile, name) for tile in ("wmma", "sm90") for name in PLANTS_SINKS),
    ("split", "sink-of-the-first"),  # whose splits are added up for rows that there are, alone
    ("split", "sink-beside-raw-scores"),
    *(("split", name) for name in PLANTS_SINKS_SPLIT),
]


@functools.cache
def planned(tile: str) -> tuple[Problem, Plan, Inputs]:
    x = make_inputs(CASE)
    problem = Problem.from_tensors(x.q, x.k, x.v, sinks=x.sinks, return_lse=True)
    arch, fields = TILES[tile]
    return problem, with_fields(select_plan(problem, arch), fields), x


def run_plant(tile: str, plant: Plant | None, seed: int) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    problem, plan, x = planned(tile)
    assert x.sinks is not None
    out, lse = torch.empty_like(x.q), torch.empty(x.q.shape[:3])
    others = {"sinks": x.sinks}
    try:
        simulate(problem, plan, x.q, x.k, x.v, None, out, lse, None, others, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    report = error_report(out, x.q, x.k, x.v, lse=lse, sinks=x.sinks)
    return "healthy" if report.ok else "wrong-result"


@pytest.mark.parametrize(("tile", "name"), CAUGHT)
def test_a_planted_bug_is_caught_with_every_seed(tile: str, name: str) -> None:
    plant = PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(tile, plant, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"
        if isinstance(found, SimulationError):
            assert found.agent is not None
            assert found.agent.file == plant.file, f"seed {seed}:\n{found}"


@pytest.mark.parametrize("tile", TILES)
def test_without_a_plant_the_same_runs_are_healthy(tile: str) -> None:
    assert {run_plant(tile, None, seed) for seed in SOME_SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS[name])


@pytest.mark.parametrize("tile", TILES)
def test_sources_without_a_plant_have_no_trace_of_one(tile: str) -> None:
    assert "plant" not in generate_source(planned(tile)[1], "host")


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(PLANTS) == []
