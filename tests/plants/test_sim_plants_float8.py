"""Run the planted bugs of caches of 8 bits; see test_sim_plants.py."""

from __future__ import annotations

import pytest
import torch
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.checks.paged_cases import PagedCase, make_paged_inputs, paged_error_report
from flashcore.checks.planned import with_fields
from flashcore.isolate.registry import find_plant
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL as WMMA
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH
from flashcore.ops.paged import paged_problem
from flashcore.problem.options import Options
from flashcore.selection.select import select_plan
from flashcore.sim import SimulationError, simulate
from flashcore.sim.plants.fwd_sm90.float8 import (
    PLANTS_FEW_SHORT_SM90,
    PLANTS_FEW_SM90,
    PLANTS_FLOAT8_SM90,
    PLANTS_GROWN_SM90,
    PLANTS_ROWS_SM90,
    PLANTS_SHORT_SM90,
    PLANTS_WIDE_SM90,
)
from flashcore.sim.plants.pieces import PLANTS_FLOAT8_WMMA

OF_CONVERTING = PLANTS_FLOAT8_SM90 | PLANTS_WIDE_SM90 | PLANTS_SHORT_SM90
OF_SHARING = PLANTS_FEW_SM90 | PLANTS_ROWS_SM90 | PLANTS_FEW_SHORT_SM90 | PLANTS_GROWN_SM90
OF_SM90 = OF_CONVERTING | OF_SHARING
ALL_PLANTS = OF_SM90 | PLANTS_FLOAT8_WMMA


def run_plant(name: str, seed: int, healthy: bool = False) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    kernel, arch = (SM90, 90) if name in OF_SM90 else (WMMA, SIM_ARCH)
    planted = find_plant(name, "sim", kernel)
    case = PagedCase(**planted.options)
    x = make_paged_inputs(case)
    problem = paged_problem(x.inputs(), Options.checked(**case.options()))
    plan = with_fields(select_plan(problem, arch, kernel=kernel), planted.tile)
    out = x.q.new_empty((*x.q.shape[:3], case.head_dim_v))
    lse = torch.empty(x.q.shape[:3])
    plant = None if healthy else planted.plant
    tensors = x.arguments()[:3]
    try:
        simulate(problem, plan, *tensors, None, out, lse, None, x.others(), seed=seed, plant=plant)
    except SimulationError as error:
        return error
    return "healthy" if paged_error_report(out, lse, case, x).ok else "wrong-result"


@pytest.mark.thorough
@pytest.mark.parametrize("name", ALL_PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = ALL_PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(name, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        *("float8-no-fence", "float8-queries-ahead", "widened-early"),
        *("few-keys-not-awaited", "few-rows-eight", "few-max-outgrown"),
    ],
)
def test_without_a_plant_the_same_runs_are_healthy(name: str) -> None:
    runs = {run_plant(name, seed, healthy=True) for seed in SOME_SEEDS}
    assert runs == {"healthy"}


@pytest.mark.parametrize("name", ALL_PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, ALL_PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(ALL_PLANTS) == []
