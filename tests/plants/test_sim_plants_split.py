"""Run the planted bugs of keys that are split over blocks; see test_sim_plants.py."""

from __future__ import annotations

import functools
import shlex

import pytest
import torch
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.compile.codegen import generate_source
from flashcore.kernels.fwd_sm90.candidates import traits_sm90
from flashcore.kernels.fwd_sm90.params import build_params_sm90
from flashcore.kernels.fwd_sm90.plan import ARCH, KERNEL, Sm90Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.fwd_sm90 import together
from flashcore.sim.plants.fwd_sm90.split import PLANTS_SPLIT
from flashcore.sim.replay import parse_replay

pytestmark = pytest.mark.thorough

PLANTS = PLANTS_SPLIT | together.PLANTS_TOGETHER
# Two row tiles a head, in five pieces each for three blocks; of eight key tiles, so that pieces
# differ in length. Of three blocks an SM, a thread has few registers and loads four shares at once.
# q is large: the shares' maxima differ.
CASE = Case(seqlen_q=70, seqlen_k=250, head_dim=32, head_dim_v=40, spread=4.0)


TILE = {"block_m": 64, "block_n": 32, "num_stages": 2, "min_blocks": 3, "num_splits": 5}
TOGETHER = Case(**together.CALL)


@functools.cache
def inputs_of(case: Case) -> tuple[Problem, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = make_inputs(case)
    return Problem.from_tensors(x.q, x.k, x.v, return_lse=True), x.q, x.k, x.v


def plan(case: Case = CASE) -> Sm90Plan:
    problem, *_ = inputs_of(case)
    tile = TILE if case is CASE else together.TILE
    return Sm90Plan(kernel=KERNEL, arch=ARCH, **tile, **traits_sm90(problem))


def run_plant(plant: Plant | None, seed: int, case: Case = CASE) -> SimulationError | str:
    """Run a plant, where the last block adds up, or all together; return the alarm, or
    "wrong-result", or "healthy"."""
    problem, q, k, v = inputs_of(case)
    out = torch.empty(*q.shape[:3], case.head_dim_v, dtype=torch.float16)
    lse = torch.empty(q.shape[:3])
    try:
        simulate(problem, plan(case), q, k, v, None, out, lse, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    return "healthy" if error_report(out, q, k, v, lse=lse).ok else "wrong-result"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(plant, seed, TOGETHER if name in together.PLANTS_TOGETHER else CASE)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"
        if isinstance(found, SimulationError) and found.agent is not None:
            reads_q = name == "first-q-not-awaited"  # by the products that are issued next
            file = "fwd_sm90/consumer_sm90.cuh" if reads_q else plant.file
            assert found.agent.file == file, f"seed {seed}:\n{found}"


def test_without_a_plant_the_same_runs_are_healthy() -> None:
    assert {run_plant(None, seed) for seed in SOME_SEEDS} == {"healthy"}
    assert {run_plant(None, seed, TOGETHER) for seed in SOME_SEEDS} == {"healthy"}


def test_who_adds_up() -> None:
    polls = []
    for case in (CASE, TOGETHER):
        problem, *_ = inputs_of(case)
        params = build_params_sm90(problem, plan(case), dict.fromkeys(("q", "k", "v", "out")), 3)
        polls.append(params.attn.most_polls)
    assert polls == [0, 32]


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
