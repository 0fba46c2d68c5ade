"""Run the planted bugs of keys that are split over blocks; see test_sim_plants.py."""

from __future__ import annotations

import functools
import shlex

import pytest
import torch
from plant_checks import check_text, undocumented

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.compile.codegen import generate_source
from flashcore.kernels.fwd_sm90.candidates import traits_sm90
from flashcore.kernels.fwd_sm90.kernel import SM90
from flashcore.kernels.fwd_sm90.plan import ARCH, KERNEL, Sm90Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.fwd_sm90 import steps
from flashcore.sim.plants.fwd_sm90.split import PLANTS_SPLIT
from flashcore.sim.replay import parse_replay

pytestmark = pytest.mark.thorough

SEEDS = range(20)
PLANTS = PLANTS_SPLIT | steps.PLANTS_STEPS
# Two row tiles a head, in five pieces each for three blocks; of eight key tiles, so that pieces
# differ in length. Of three blocks an SM, a thread has few registers and loads four shares at once.
# q is large: the shares' maxima differ.
CASE = Case(seqlen_q=70, seqlen_k=250, head_dim=32, head_dim_v=40, spread=4.0)


@functools.cache
def case_with_inputs() -> tuple[Problem, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = make_inputs(CASE)
    return Problem.from_tensors(x.q, x.k, x.v, return_lse=True), x.q, x.k, x.v


def plan(num_splits: int = 5, min_blocks: int = 3) -> Sm90Plan:
    problem, *_ = case_with_inputs()
    return Sm90Plan(
        kernel=KERNEL,
        arch=ARCH,
        block_m=64,
        block_n=32,
        num_stages=2,
        min_blocks=min_blocks,
        num_splits=num_splits,
        **traits_sm90(problem),
    )


def run_plant(plant: Plant | None, seed: int, in_steps: bool = False) -> SimulationError | str:
    """Run a plant, with as many shares as are added up in one step or in two; return the alarm, or
    "wrong-result", or "healthy"."""
    problem, q, k, v = case_with_inputs()
    out = torch.empty(1, 2, CASE.seqlen_q, CASE.head_dim_v, dtype=torch.float16)
    lse = torch.empty(1, 2, CASE.seqlen_q)
    try:
        own = plan(steps.TILE["num_splits"], 1) if in_steps else plan()
        simulate(problem, own, q, k, v, None, out, lse, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    return "healthy" if error_report(out, q, k, v, lse=lse).ok else "wrong-result"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS[name]
    for seed in SEEDS:
        found = run_plant(plant, seed, name in steps.PLANTS_STEPS)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"
        if isinstance(found, SimulationError) and found.agent is not None:
            assert found.agent.file == plant.file, f"seed {seed}:\n{found}"


def test_without_a_plant_the_same_runs_are_healthy() -> None:
    assert {run_plant(None, seed) for seed in SEEDS[::4]} == {"healthy"}
    assert {run_plant(None, seed, in_steps=True) for seed in SEEDS[::4]} == {"healthy"}


def test_there_are_two_steps() -> None:
    problem, *_ = case_with_inputs()
    shapes = [SM90.scratch_shapes(problem, x) for x in (plan(), plan(44, 3), plan(44, 1))]
    assert [x["split_out"][0] for x in shapes] == [5, 44, 44 + 6]


def test_the_replay_command_repeats_the_run() -> None:
    found = run_plant(PLANTS_SPLIT["split-relaxed"], 3)
    assert isinstance(found, SimulationError)
    replay = parse_replay(shlex.split(found.replay)[3:])
    assert replay.plan == plan()
    with pytest.raises(SimulationError) as again:
        replay.run()
    assert str(again.value) == str(found)


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS[name])


def test_sources_without_a_plant_have_no_trace_of_one() -> None:
    assert "plant" not in generate_source(plan(), "host")


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(PLANTS) == []
