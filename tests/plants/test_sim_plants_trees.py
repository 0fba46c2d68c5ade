"""Run the planted bugs of trees of drafts; see test_sim_plants.py."""

from __future__ import annotations

import shlex

import pytest
import torch
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented
from torch import Tensor

from flashcore.checks.paged_cases import PagedCase, paged_error_report
from flashcore.checks.planned import with_fields
from flashcore.isolate.call import Call, call_of
from flashcore.isolate.registry import find_plant
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL as WMMA
from flashcore.selection.select import select_plan
from flashcore.sim import SimulationError, simulate
from flashcore.sim.plants import trees
from flashcore.sim.replay import parse_replay

pytestmark = pytest.mark.thorough

OF_WMMA = trees.OF_WMMA | trees.PLANTS_PACKED_TREES
OF_SM90 = trees.OF_SM90 | trees.PLANTS_PACKED_TREES | trees.PLANTS_PACKED_TREES_SM90
PLANTED = [*((name, WMMA) for name in OF_WMMA), *((name, SM90) for name in OF_SM90)]


def tree_of(call: Call) -> Tensor:
    """Return the trees of a call, of each head, as a replay has them."""
    assert call.mask is not None
    return call.mask.expand(call.problem.batch, call.problem.num_heads_q, -1, -1)


def run_plant(name: str, kernel: str, seed: int, healthy: bool = False) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    planted = find_plant(name, "sim", kernel)
    case = PagedCase(**planted.options)
    call = call_of(case, "cpu")
    assert call.cache is not None
    plan = select_plan(call.problem, 90 if kernel == SM90 else 80, kernel=kernel)
    plan = with_fields(plan, planted.tile)
    assert plan.folds_heads == (0 if name in trees.PLANTS_PACKED_TREES else 2)
    out, lse = torch.empty_like(call.cache.q), torch.empty(call.q.shape[:3])
    lse = lse[0] if case.lengths_q else lse
    plant = None if healthy else planted.plant
    tensors = call.q, call.k, call.v, tree_of(call), out, lse
    try:
        simulate(call.problem, plan, *tensors, None, call.lengths, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    return "healthy" if paged_error_report(out, lse, case, call.cache).ok else "wrong-result"


@pytest.mark.parametrize(("name", "kernel"), PLANTED)
def test_a_planted_bug_is_caught_with_every_seed(name: str, kernel: str) -> None:
    plant = (OF_WMMA | OF_SM90)[name]
    for seed in seeds_of(plant):
        found = run_plant(name, kernel, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


# One of each call.
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("tree-at-the-front", WMMA),
        ("tree-at-the-front", SM90),
        ("packed-tree-whole", WMMA),
        ("packed-tree-whole", SM90),
        ("packed-tree-of-rows", SM90),
    ],
)
def test_without_a_plant_the_same_runs_are_healthy(name: str, kernel: str) -> None:
    found = {run_plant(name, kernel, seed, True) for seed in SOME_SEEDS}
    assert found == {"healthy"}


@pytest.mark.parametrize("kernel", [WMMA, SM90])
@pytest.mark.parametrize("name", ["tree-at-the-front", "packed-tree-of-the-longest"])
def test_the_replay_command_repeats_the_run_with_the_same_trees(name: str, kernel: str) -> None:
    found = run_plant(name, kernel, 3)
    assert isinstance(found, SimulationError)
    replay = parse_replay(shlex.split(found.replay)[3:])
    planted = find_plant(name, "sim", kernel)
    assert replay.mask is not None
    assert torch.equal(replay.mask, tree_of(call_of(PagedCase(**planted.options), "cpu")))
    with pytest.raises(SimulationError) as again:
        replay.run()
    assert str(again.value) == str(found)


@pytest.mark.parametrize("name", OF_WMMA | OF_SM90)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, (OF_WMMA | OF_SM90)[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(OF_WMMA | OF_SM90) == []
