"""Run the planted-bug suite of the backward kernels for Hopper with sequences of different lengths;
see test_sim_plants.py."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from gradient_rule import wrong_gradients
from packed_gradients import PackedCase, make_packed, wrong_packed_gradients
from plant_checks import SOME_SEEDS, HealthyRuns, check_text, seeds_of, undocumented
from test_backward_sm90 import plans_of

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.backends.tiled import attention_tiled
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.ops.padded import padded_problem
from flashcore.problem.memory_layout import as_batch, as_rows
from flashcore.problem.options import Inputs, Options
from flashcore.sim import Plant, SimulationError
from flashcore.sim.plants.bwd_sm90.lengths import (
    PLANTS_BWD_PACKED_DQ_SM90,
    PLANTS_BWD_PACKED_SM90,
    PLANTS_BWD_PADDED_SM90,
)
from flashcore.sim.run_bwd import simulate_backward

pytestmark = pytest.mark.thorough

# Heads of a group, and two warpgroups of rows and of keys, of which some sequences fill one; keys
# and queries behind the last sequence.
CASE = PackedCase(
    lengths_q=(70, 5, 30), lengths_k=(40, 130, 90), tails=(9, 70), group=2, head_dim=32, causal=True
)
# The last queries would see keys behind a sequence's last one, were there any.
LENGTHS_K, WINDOW = (40, 150, 97), (-1, 5)
TILES = BwdTile(128, 32, 3, 2), BwdTile(32, 128, 3, 2, False, True, False)
PLANTS = PLANTS_BWD_PACKED_SM90 | PLANTS_BWD_PACKED_DQ_SM90 | PLANTS_BWD_PADDED_SM90

HEALTHY = HealthyRuns()  # of the kernel of dq; the kernel of dk and dv comes after it


@functools.cache
def packed():
    return make_packed(CASE)


@functools.cache
def padded():
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(3, heads, rows, 32, generator=generator).to(torch.bfloat16)
        for heads, rows in ((2, 70), (1, 150), (1, 150), (2, 70))
    )
    seqlens_k = torch.tensor(LENGTHS_K, dtype=torch.int32)
    options = Options.checked(False, WINDOW, None, None)
    problem = padded_problem(Inputs(q, k, v, None, seqlens_k), options)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    for b, n in enumerate(LENGTHS_K):
        one = slice(b, b + 1)
        own = problem.of_sequence(70, n)
        out[one], lse[one] = attention_tiled(own, q[one], k[one, :, :n], v[one, :, :n], None)
    dout = dout.masked_fill((lse == -math.inf)[..., None], 0.0)
    return problem, q, k, v, seqlens_k, out, lse, dout


def run_packed(run) -> list[str]:
    x = packed()
    found = fused_backward(
        x.problem, as_batch(x.q), as_batch(x.k), as_batch(x.v), None, as_batch(x.out), x.lse,
        as_batch(x.dout), None, run, plans_of(x.problem, TILES), x.lengths(),
    )  # fmt: skip
    return wrong_packed_gradients(CASE, x, tuple(map(as_rows, found)))


def run_padded(run) -> list[str]:
    problem, q, k, v, seqlens_k, out, lse, dout = padded()
    dq, dk, dv = fused_backward(
        problem, q, k, v, None, out, lse, dout, None, run, plans_of(problem, TILES),
        {"seqlens_k": seqlens_k},
    )  # fmt: skip
    wrong = []
    for b, n in enumerate(LENGTHS_K):
        one = slice(b, b + 1)
        if dk[b, :, n:].any() or dv[b, :, n:].any():
            wrong.append(f"keys behind sequence {b} are not 0")
        wrong += wrong_gradients(
            (dq[one], dk[one, :, :n], dv[one, :, :n]),
            q[one], k[one, :, :n], v[one, :, :n], None, dout[one], None, {"window": WINDOW},
        )  # fmt: skip
    return wrong


def run_plant(plant: Plant | None, is_packed: bool, seed: int) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""

    def run(problem, plan, tensors) -> None:
        in_dq = plant is not None and plant.name in PLANTS_BWD_PACKED_DQ_SM90
        if plan.is_dq and plant is not None and not in_dq:
            HEALTHY.simulate(is_packed, problem, plan, tensors, seed)
            return
        planted = plant if plan.is_dq == in_dq else None
        simulate_backward(problem, plan, tensors, seed=seed, plant=planted)

    try:
        wrong = run_packed(run) if is_packed else run_padded(run)
    except SimulationError as error:
        return error
    return "wrong-result" if wrong else "healthy"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(plant, name not in PLANTS_BWD_PADDED_SM90, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("is_packed", [True, False])
def test_without_a_plant_the_same_runs_are_healthy(is_packed: bool) -> None:
    assert {run_plant(None, is_packed, seed) for seed in SOME_SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    page = Path(__file__).parents[2] / "docs" / "backward.md"
    assert undocumented(PLANTS, page) == []
