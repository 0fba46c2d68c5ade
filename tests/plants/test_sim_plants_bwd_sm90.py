"""Run the planted-bug suite of the backward kernels for Hopper; see test_sim_plants.py."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from plant_checks import SOME_SEEDS, HealthyRuns, check_text, seeds_of, undocumented
from test_backward_sm90 import plans_of

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.checks.cases import make_inputs
from flashcore.kernels.bwd_sm90.plan import BwdPlans
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.problem.case import Case
from flashcore.sim import Plant, SimulationError
from flashcore.sim.plants.bwd_sm90.beside import (
    PLANTS_BWD_BESIDE_DQ_SM90,
    PLANTS_BWD_BESIDE_SM90,
)
from flashcore.sim.plants.bwd_sm90.kernels import (
    PLANTS_BWD_DKDV_SM90,
    PLANTS_BWD_DQ_SM90,
    PLANTS_BWD_ROLES_SM90,
)
from flashcore.sim.run_bwd import simulate_backward

pytestmark = pytest.mark.thorough

# Two heads of a group, rows that see nothing, keys that one warpgroup of two passes over, and for
# three blocks more tiles of rows and of keys than that.
CASE = Case(
    batch=2,
    num_heads_q=4,
    num_heads_kv=2,
    seqlen_q=170,
    seqlen_k=150,
    head_dim=32,
    head_dim_v=32,
    dtype="bfloat16",
    causal="lower_right",
)
TILES = BwdTile(64, 32, 3, 2), BwdTile(32, 128, 3, 2, False, True, False)
ROLES_CASE = dataclasses.replace(CASE, seqlen_q=110, head_dim=136, head_dim_v=136)
ROLES_TILES = BwdTile(64, 32, 2, 1), BwdTile(32, 64, 2, 2)
PLANTS_OF_DQ = PLANTS_BWD_DQ_SM90 | PLANTS_BWD_BESIDE_DQ_SM90
PLANTS = PLANTS_BWD_DKDV_SM90 | PLANTS_BWD_BESIDE_SM90 | PLANTS_OF_DQ | PLANTS_BWD_ROLES_SM90


@functools.cache
def inputs(case: Case):
    x = make_inputs(case)
    problem, out, lse = forward(x.q, x.k, x.v, None, case.options())
    torch.manual_seed(0)
    empty = lse == -math.inf
    dout = torch.randn_like(out).masked_fill(empty[..., None], math.nan)
    dlse = torch.randn_like(lse).masked_fill(empty, math.nan)
    return problem, x, out, lse, dout, dlse


def plans_with(case: Case, plant: Plant | None) -> BwdPlans:
    tiles = ROLES_TILES if case is ROLES_CASE else TILES
    plans = plans_of(inputs(case)[0], tiles)
    changed = {} if plant is None else dict(plant.plan)
    return plans._replace(dkdv=dataclasses.replace(plans.dkdv, **changed))


HEALTHY = HealthyRuns()  # of the kernel of dq; the kernel of dk and dv comes after it


def run_plant(
    plant: Plant | None, case: Case, seed: int, plans: BwdPlans, dq_is_known: bool = False
) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy". The kernel of dq is run once
    for all seeds if the bug is in the other one, or where `dq_is_known` to be healthy."""
    problem, x, out, lse, dout, dlse = inputs(case)

    def run(problem, plan, tensors) -> None:
        in_dq = plant is not None and plant.name in PLANTS_OF_DQ
        if plan.is_dq and (dq_is_known or (plant is not None and not in_dq)):
            HEALTHY.simulate(case, problem, plan, tensors, seed)
            return
        planted = plant if plan.is_dq == in_dq else None
        simulate_backward(problem, plan, tensors, seed=seed, plant=planted)

    qkv = x.q, x.k, x.v, None
    try:
        gradients = fused_backward(problem, *qkv, out, lse, dout, dlse, run, plans)
    except SimulationError as error:
        return error
    wrong = wrong_gradients(gradients, *qkv, dout, dlse, case.options())
    return "wrong-result" if wrong else "healthy"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS[name]
    case = ROLES_CASE if name in PLANTS_BWD_ROLES_SM90 else CASE
    plans = plans_with(case, plant)
    for seed in seeds_of(plant):
        found = run_plant(plant, case, seed, plans)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("case", [CASE, ROLES_CASE])
@pytest.mark.parametrize("changed", [{}, {"early_dp": False}, {"overlaps": True}])
def test_without_a_plant_the_same_runs_are_healthy(case: Case, changed: dict[str, bool]) -> None:
    plans = plans_with(case, None)
    plans = plans._replace(dkdv=dataclasses.replace(plans.dkdv, **changed))
    found = {run_plant(None, case, seed, plans, dq_is_known=bool(changed)) for seed in SOME_SEEDS}
    assert found == {"healthy"}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    page = Path(__file__).parents[2] / "docs" / "backward.md"
    assert undocumented(PLANTS, page) == []
