"""Run the planted-bug suite of dq in the kernel of dk and dv; see test_sim_plants.py."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from plant_checks import check_text, undocumented

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.checks.cases import Case, make_inputs
from flashcore.kernels.bwd_sm90.plan_one import make_plans
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.sim import Plant, SimulationError
from flashcore.sim.plants.bwd_sm90.one import PLANTS_BWD_ONE_SM90 as PLANTS
from flashcore.sim.run_bwd import simulate_backward

pytestmark = pytest.mark.thorough

SEEDS = range(20)

# Two heads of a group, keys that one warpgroup of two passes over, a last tile of keys that is
# nearly empty, and rows whose lse is so low that keys which do not exist have infinite p.
CASE = Case(
    batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=200, seqlen_k=150, head_dim=32,
    head_dim_v=32, dtype="bfloat16", causal="lower_right",
)  # fmt: skip
TILE = BwdTile(64, 128, 3, 2, True, True, False)


@functools.cache
def inputs():
    x = make_inputs(CASE)
    x.q[:, :, :, 0], x.k[:, :, :, 0] = 60.0, -20.0
    problem, out, lse = forward(x.q, x.k, x.v, None, CASE.options())
    torch.manual_seed(0)
    dout = torch.randn_like(out).masked_fill((lse == -math.inf)[..., None], math.nan)
    return problem, x, out, lse, dout


def run_plant(plant: Plant | None, seed: int) -> SimulationError | str:
    """Return the alarm, or "wrong-result", or "healthy"."""
    problem, x, out, lse, dout = inputs()
    plans = make_plans(TILE, traits(problem) | {"folds_heads": 0})

    def run(problem, plan, tensors) -> None:
        planted = plant if plan is plans.main else None
        simulate_backward(problem, plan, tensors, seed=seed, plant=planted)

    qkv = x.q, x.k, x.v, None
    try:
        gradients = fused_backward(problem, *qkv, out, lse, dout, None, run, plans)
    except SimulationError as error:
        return error
    wrong = wrong_gradients(gradients, *qkv, dout, None, CASE.options())
    return "wrong-result" if wrong else "healthy"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS[name]
    for seed in SEEDS:
        found = run_plant(plant, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


def test_without_a_plant_the_same_runs_are_healthy() -> None:
    assert {run_plant(None, seed) for seed in SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "backward.md"
    assert undocumented(PLANTS, page) == []
