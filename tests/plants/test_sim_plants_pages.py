"""Run the planted bugs of caches in pages; see test_sim_plants.py."""

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
from flashcore.ops.paged import NAMES, paged_problem
from flashcore.problem.options import Inputs, Options
from flashcore.selection.select import select_plan
from flashcore.sim import SimulationError, simulate
from flashcore.sim.plants.pages import (
    PLANTS_PAGES,
    PLANTS_PAGES_SM90,
    PLANTS_PAGES_WIDE,
    PLANTS_PAGES_WMMA,
)
from flashcore.sim.replay import parse_replay

pytestmark = pytest.mark.thorough

PLANTED = [
    *((name, kernel) for kernel in (WMMA, SM90) for name in PLANTS_PAGES),
    *((name, WMMA) for name in PLANTS_PAGES_WMMA),
    *((name, SM90) for name in PLANTS_PAGES_SM90 | PLANTS_PAGES_WIDE),
]
ALL_PLANTS = PLANTS_PAGES | PLANTS_PAGES_WMMA | PLANTS_PAGES_SM90 | PLANTS_PAGES_WIDE


def run_plant(name: str, kernel: str, seed: int, healthy: bool = False) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    planted = find_plant(name, "sim", kernel)
    case = PagedCase(**planted.options)
    x = make_paged_inputs(case)
    q, k, v, table, seqlens_k = x.arguments()
    inputs = Inputs(q, k, v, seqlens_k=seqlens_k, page_table=table)
    problem = paged_problem(inputs, Options.checked(**case.options()))
    plan = with_fields(
        select_plan(problem, 90 if kernel == SM90 else 80, kernel=kernel), planted.tile
    )
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    lengths = {name: getattr(inputs, name) for name in NAMES}
    plant = None if healthy else planted.plant
    try:
        simulate(problem, plan, q, k, v, None, out, lse, None, lengths, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    return "healthy" if paged_error_report(out, lse, case, x).ok else "wrong-result"


@pytest.mark.parametrize(("name", "kernel"), PLANTED)
def test_a_planted_bug_is_caught_with_every_seed(name: str, kernel: str) -> None:
    plant = ALL_PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(name, kernel, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize(("name", "kernel"), [("page-unchecked", WMMA), ("page-unchecked", SM90)])
def test_without_a_plant_the_same_runs_are_healthy(name: str, kernel: str) -> None:
    assert {run_plant(name, kernel, seed, healthy=True) for seed in SOME_SEEDS} == {"healthy"}


@pytest.mark.parametrize(("name", "kernel"), [("page-of-no-key", WMMA), ("page-two-leaders", SM90)])
def test_the_replay_command_repeats_the_run(name: str, kernel: str) -> None:
    found = run_plant(name, kernel, 3)
    assert isinstance(found, SimulationError)
    with pytest.raises(SimulationError) as again:
        parse_replay(shlex.split(found.replay)[3:]).run()
    assert str(again.value) == str(found)


@pytest.mark.parametrize("name", ALL_PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, ALL_PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(ALL_PLANTS) == []
