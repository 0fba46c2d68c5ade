"""Run the planted bugs of sequences of different lengths; see test_sim_plants.py."""

from __future__ import annotations

import shlex

import pytest
import torch
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.backends.packed import as_batch, packed_problem
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs, varlen_error_report
from flashcore.kernels.fwd_sm90.candidates import traits_sm90
from flashcore.kernels.fwd_sm90.plan import ARCH, KERNEL, Sm90Plan
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection.select import candidates
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.varlen import PLANTS_VARLEN, PLANTS_VARLEN_SM90
from flashcore.sim.replay import parse_replay

pytestmark = pytest.mark.thorough

CASE = VarlenCase(
    lengths_q=(60, 0, 70, 1, 9), lengths_k=(40, 3, 90, 17, 0), num_heads_kv=1, causal="lower_right"
)
# Bugs that only malformed lengths show: the last sequence ends far behind the tensors.
PAST_THE_END = {"no-clamp"}


ALL_PLANTS = PLANTS_VARLEN | PLANTS_VARLEN_SM90


def plan_of(problem: Problem, sm90: bool) -> Plan:
    """Return a plan with small tiles, so that there are many of them."""
    if not sm90:
        return min(candidates(problem, 80), key=lambda p: (p.block_m, p.block_n))
    return Sm90Plan(
        kernel=KERNEL,
        arch=ARCH,
        block_m=128,
        block_n=32,
        num_stages=2,
        min_blocks=1,
        ping_pong=True,
        **traits_sm90(problem),
    )


def run_plant(
    plant: Plant | None, seed: int, sm90: bool, past_the_end: bool = False
) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    x = make_varlen_inputs(CASE)
    problem = packed_problem(*x.arguments(), **CASE.options())
    lengths = {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
    if past_the_end:
        lengths = {name: t.clone() for name, t in lengths.items()}
        for cu_seqlens in lengths.values():
            cu_seqlens[-1] += 1000
    out = torch.empty(problem.total_q, 2, 64, dtype=torch.float16)
    lse = torch.empty(2, problem.total_q)
    plan = plan_of(problem, sm90)
    q, k, v = (as_batch(t) for t in (x.q, x.k, x.v))
    try:
        simulate(problem, plan, q, k, v, None, out, lse, None, lengths, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    report = varlen_error_report(out, lse, CASE, x)
    return "healthy" if report is None or report.ok else "wrong-result"


@pytest.mark.parametrize("name", ALL_PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = ALL_PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(plant, seed, name in PLANTS_VARLEN_SM90, name in PAST_THE_END)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("sm90", [False, True])
def test_without_a_plant_the_same_runs_are_healthy(sm90: bool) -> None:
    assert {run_plant(None, seed, sm90) for seed in SOME_SEEDS} == {"healthy"}
    assert run_plant(None, 0, sm90, past_the_end=True) == "healthy"


@pytest.mark.parametrize("name", ["neighbours-query", "box-of-a-neighbour"])
def test_the_replay_command_repeats_the_run(name: str) -> None:
    found = run_plant(ALL_PLANTS[name], 3, name in PLANTS_VARLEN_SM90)
    assert isinstance(found, SimulationError)
    with pytest.raises(SimulationError) as again:
        parse_replay(shlex.split(found.replay)[3:]).run()
    assert str(again.value) == str(found)


@pytest.mark.parametrize("name", ALL_PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, ALL_PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(ALL_PLANTS) == []
