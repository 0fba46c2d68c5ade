"""Run the planted bugs of packed sequences whose heads are folded, and of those whose keys the
device cuts into ranges, in both kernels; see test_sim_plants.py."""

from __future__ import annotations

import pytest
import torch
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.backends.packed import as_batch, packed_problem
from flashcore.checks.planned import with_fields
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs, varlen_error_report
from flashcore.isolate.registry import find_plant
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL as WMMA
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH
from flashcore.selection.select import select_plan
from flashcore.sim import SimulationError, simulate
from flashcore.sim.plants.fwd_sm90.folded import PLANTS_FOLDED_SM90
from flashcore.sim.plants.fwd_sm90.packed import PLANTS_PACKED
from flashcore.sim.plants.pieces import OF_PACKED

ALL_PLANTS = PLANTS_FOLDED_SM90 | OF_PACKED
RUNS = [
    *((name, SM90) for name in PLANTS_FOLDED_SM90 | PLANTS_PACKED),
    *((name, WMMA) for name in OF_PACKED),
]


def run_plant(name: str, kernel: str, seed: int, healthy: bool = False) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    planted = find_plant(name, "sim", kernel)
    case = VarlenCase(**planted.options)
    x = make_varlen_inputs(case)
    problem = packed_problem(*x.arguments(), sinks=x.sinks, **case.options())
    arch = 90 if kernel == SM90 else SIM_ARCH
    plan = with_fields(select_plan(problem, arch, kernel=kernel), planted.tile)
    assert plan.folds_heads == 3
    out = torch.empty(problem.total_q, case.num_heads_q, case.head_dim_v, dtype=x.q.dtype)
    lse = torch.empty(case.num_heads_q, problem.total_q)
    tensors = (as_batch(t) for t in (x.q, x.k, x.v))
    plant = None if healthy else planted.plant
    try:
        simulate(problem, plan, *tensors, None, out, lse, None, x.others, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    report = varlen_error_report(out, lse, case, x)
    return "healthy" if report is None or report.ok else "wrong-result"


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "kernel"), RUNS)
def test_a_planted_bug_is_caught_with_every_seed(name: str, kernel: str) -> None:
    plant = ALL_PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(name, kernel, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("packed-query-as-row", SM90),
        ("packed-tiles-of-queries", SM90),
        ("packed-slot-of-own-rows", SM90),
        ("packed-slot-of-own-rows", WMMA),
    ],
)
def test_without_a_plant_the_same_runs_are_healthy(name: str, kernel: str) -> None:
    runs = {str(run_plant(name, kernel, seed, healthy=True)) for seed in SOME_SEEDS}
    assert runs == {"healthy"}


@pytest.mark.parametrize("name", ALL_PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, ALL_PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(ALL_PLANTS) == []
