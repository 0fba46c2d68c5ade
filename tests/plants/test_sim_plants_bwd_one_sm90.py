"""Run the planted-bug suites of dq in the kernel of dk and dv; see test_sim_plants.py."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.checks.cases import Case, make_inputs
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL
from flashcore.kernels.bwd_sm90.plan_one import (
    DELTA_KERNEL,
    ROUND_KERNEL,
    in_any_order,
    make_plans,
)
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.kernels.fwd_sm90.tiles import mask_traits
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.sim import Plant, SimulationError
from flashcore.sim.plants.bwd_sm90.one import (
    PLANTS_BWD_DELTA_SM90,
    PLANTS_BWD_ONE_SM90,
    PLANTS_BWD_ORDER_SM90,
    PLANTS_BWD_ROUND_SM90,
    PLANTS_BWD_SHARED_SM90,
)
from flashcore.sim.plants.bwd_sm90.one_with import (
    PLANTS_BWD_ANY_ORDER_SM90,
    PLANTS_BWD_ONE_CAPPED_SM90,
    PLANTS_BWD_ONE_MASKED_SM90,
)
from flashcore.sim.run_bwd import simulate_backward

pytestmark = pytest.mark.thorough

# Two heads of a group, keys that one warpgroup of two passes over, a last tile of keys that is
# nearly empty, and rows whose lse is so low that keys which do not exist have infinite p.
CASE = Case(
    batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=200, seqlen_k=150, head_dim=32,
    head_dim_v=32, dtype="bfloat16", causal="lower_right",
)  # fmt: skip
# One batch, as consumers that share dQ have a large head_dim.
SHARED_CASE = dataclasses.replace(CASE, batch=1, head_dim=104, head_dim_v=16)
# Rows that see no key, and of the others some that do not see the first ones. All tiles of keys are
# of one head, so that those side by side are of several blocks.
WINDOW_CASE = dataclasses.replace(
    CASE, batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=600, seqlen_k=400, causal="none",
    window=(140, 20),
)  # fmt: skip
# Heads of a group have masks of their own.
MASKED_CASE = dataclasses.replace(CASE, mask="bool")
CAPPED_CASE = dataclasses.replace(CASE, softcap=2.0, dtype="float16")
PLANTS_IN_ORDER = PLANTS_BWD_ORDER_SM90 | PLANTS_BWD_DELTA_SM90 | PLANTS_BWD_ROUND_SM90
PLANTS = PLANTS_BWD_ONE_SM90 | PLANTS_BWD_SHARED_SM90 | PLANTS_IN_ORDER
PLANTS |= PLANTS_BWD_ONE_MASKED_SM90 | PLANTS_BWD_ONE_CAPPED_SM90 | PLANTS_BWD_ANY_ORDER_SM90
IN_ANY_ORDER = {*PLANTS_BWD_ANY_ORDER_SM90, "sums-not-cleared"}
CASES = dict.fromkeys(PLANTS, CASE)
CASES |= dict.fromkeys(PLANTS_BWD_SHARED_SM90, SHARED_CASE)
CASES |= dict.fromkeys(PLANTS_IN_ORDER | PLANTS_BWD_ANY_ORDER_SM90, WINDOW_CASE)
CASES |= dict.fromkeys(PLANTS_BWD_ONE_MASKED_SM90, MASKED_CASE)
CASES |= dict.fromkeys(PLANTS_BWD_ONE_CAPPED_SM90, CAPPED_CASE)


def plant_kernel(plant: Plant) -> str:
    """Return the kernel that a bug is planted in."""
    name = Path(plant.file).stem
    return name if name in (DELTA_KERNEL, ROUND_KERNEL) else DKDV_KERNEL


@functools.cache
def inputs(case: Case):
    x = make_inputs(case)
    x.q[:, :, :, 0], x.k[:, :, :, 0] = 60.0, -20.0
    problem, out, lse = forward(x.q, x.k, x.v, x.mask, case.options())
    torch.manual_seed(0)
    dout = torch.randn_like(out).masked_fill((lse == -math.inf)[..., None], math.nan)
    return problem, x, out, lse, dout


def run_plant(
    plant: Plant | None, seed: int, case: Case, ordered: bool = True
) -> SimulationError | str:
    """Return the alarm, or "wrong-result", or "healthy"."""
    problem, x, out, lse, dout = inputs(case)
    is_shared = case == SHARED_CASE
    tile = BwdTile(64, 128, 3, 2, True, not is_shared, False)
    of_problem = traits(problem) | mask_traits(problem) | {"folds_heads": 0}
    plans = make_plans(tile, of_problem, 1 + is_shared)
    plans = plans if ordered else in_any_order(plans)

    def run(problem, plan, tensors) -> None:
        is_planted = plant is not None and plan.kernel == plant_kernel(plant)
        simulate_backward(problem, plan, tensors, seed=seed, plant=plant if is_planted else None)

    given = x.q, x.k, x.v, x.mask
    try:
        gradients = fused_backward(problem, *given, out, lse, dout, None, run, plans)
    except SimulationError as error:
        return error
    wrong = wrong_gradients(gradients, *given, dout, None, case.options())
    return "wrong-result" if wrong else "healthy"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(plant, seed, CASES[name], name not in IN_ANY_ORDER)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("case", [CASE, SHARED_CASE, WINDOW_CASE, MASKED_CASE, CAPPED_CASE])
@pytest.mark.parametrize("ordered", [True, False])
def test_without_a_plant_the_same_runs_are_healthy(case: Case, ordered: bool) -> None:
    assert {run_plant(None, seed, case, ordered) for seed in SOME_SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "backward.md"
    assert undocumented(PLANTS, page) == []
