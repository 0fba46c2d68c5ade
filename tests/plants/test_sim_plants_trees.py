"""Run the planted bugs of trees of drafts; see test_sim_plants.py."""

from __future__ import annotations

import shlex

import pytest
import torch
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.checks.paged_cases import PagedCase, make_paged_inputs, paged_error_report
from flashcore.checks.planned import with_fields
from flashcore.isolate.registry import find_plant
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL as WMMA
from flashcore.ops.paged import paged_problem
from flashcore.problem.options import Options
from flashcore.selection.select import select_plan
from flashcore.sim import SimulationError, simulate
from flashcore.sim.plants.trees import OF_SM90, OF_WMMA
from flashcore.sim.replay import parse_replay

pytestmark = pytest.mark.thorough

PLANTED = [*((name, WMMA) for name in OF_WMMA), *((name, SM90) for name in OF_SM90)]


def run_plant(name: str, kernel: str, seed: int, healthy: bool = False) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    planted = find_plant(name, "sim", kernel)
    case = PagedCase(**planted.options)
    x = make_paged_inputs(case)
    problem = paged_problem(x.inputs(), Options.checked(**case.options()))
    plan = select_plan(problem, 90 if kernel == SM90 else 80, kernel=kernel)
    plan = with_fields(plan, planted.tile)
    out, lse = torch.empty_like(x.q), torch.empty(x.q.shape[:3])
    plant = None if healthy else planted.plant
    assert x.tree_mask is not None
    tree = x.tree_mask.expand(*x.q.shape[:3], -1)  # as a replay has it
    tensors = x.q, x.k_pages, x.v_pages, tree, out, lse
    try:
        simulate(problem, plan, *tensors, None, x.others(), seed=seed, plant=plant)
    except SimulationError as error:
        return error
    return "healthy" if paged_error_report(out, lse, case, x).ok else "wrong-result"


@pytest.mark.parametrize(("name", "kernel"), PLANTED)
def test_a_planted_bug_is_caught_with_every_seed(name: str, kernel: str) -> None:
    plant = (OF_WMMA | OF_SM90)[name]
    for seed in seeds_of(plant):
        found = run_plant(name, kernel, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("kernel", [WMMA, SM90])
def test_without_a_plant_the_same_runs_are_healthy(kernel: str) -> None:
    found = {run_plant("tree-at-the-front", kernel, seed, True) for seed in SOME_SEEDS}
    assert found == {"healthy"}


@pytest.mark.parametrize("kernel", [WMMA, SM90])
def test_the_replay_command_repeats_the_run(kernel: str) -> None:
    found = run_plant("tree-at-the-front", kernel, 3)
    assert isinstance(found, SimulationError)
    with pytest.raises(SimulationError) as again:
        parse_replay(shlex.split(found.replay)[3:]).run()
    assert str(again.value) == str(found)


@pytest.mark.parametrize("name", OF_WMMA | OF_SM90)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, (OF_WMMA | OF_SM90)[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(OF_WMMA | OF_SM90) == []
