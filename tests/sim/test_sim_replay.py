"""A replay command runs the same again: strides, offsets, plan, gate, plant and inputs included."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys

import pytest
import torch

from flashcore.checks.cases import make_inputs
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import candidates, select_plan
from flashcore.sim import PLANTS, SimulationError, simulate
from flashcore.sim.replay import parse_replay

CASES = {
    "plain": (Case(seqlen_q=70, seqlen_k=70), None, "deadlock"),
    "views, mask, gqa": (
        Case(
            batch=2,
            num_heads_q=4,
            seqlen_q=70,
            seqlen_k=41,
            head_dim=24,
            head_dim_v=40,
            dtype="bfloat16",
            causal="lower_right",
            softcap=3.0,
            scale=0.3,
            mask="additive",
            layout="bshd",
            tail=2,
            offset=2,
        ),
        None,
        "no-barrier",
    ),
    "bool mask, window": (
        Case(mask="bool", window=(5, 3), batch=2, head_dim=32, head_dim_v=32),
        None,
        "pv-atomic",
    ),
    "padding mask": (Case(mask="padding", batch=3), None, "uninit-smem"),
    "gate": (Case(seqlen_q=33), "pv", "pv-atomic"),
}


def fail(case: Case, gate: str | None, plant: str, other_plan: bool) -> tuple[Plan, str, str]:
    """Run a planted bug; return the plan, the report and the command."""
    x = make_inputs(case)
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options())
    plan = select_plan(problem, 80, gate)
    if other_plan:
        plan = candidates(problem, 80, gate)[-1]
    rows = (case.batch, case.num_heads_q, case.seqlen_q)
    out = torch.empty(*rows, case.head_dim_v, dtype=case.torch_dtype)
    buffers = None
    if gate is not None:
        num_n_blocks = -(-case.seqlen_k // plan.block_n)
        buffers = {
            "gate_scores": torch.rand(*rows, case.seqlen_k),
            "gate_row_max": torch.empty(*rows, num_n_blocks),
            "gate_row_sum": torch.empty(*rows, num_n_blocks),
        }
    with pytest.raises(SimulationError) as caught:
        simulate(
            problem,
            plan,
            x.q,
            x.k,
            x.v,
            x.mask,
            out,
            torch.empty(rows),
            buffers,
            seed=23,
            plant=PLANTS[plant],
        )
    return plan, str(caught.value), caught.value.replay


@pytest.mark.parametrize("other_plan", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_replay_gives_the_same_report(name: str, other_plan: bool) -> None:
    case, gate, plant = CASES[name]
    plan, report, command = fail(case, gate, plant, other_plan)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "flashcore.sim"]
    replay = parse_replay(words[3:])
    assert replay.inputs_are_saved
    assert replay.plan == plan
    with pytest.raises(SimulationError) as again:
        replay.run()
    assert str(again.value) == report


def test_the_inputs_are_the_failing_runs_own() -> None:
    case, gate, plant = CASES["views, mask, gqa"]
    _, _, command = fail(case, gate, plant, other_plan=False)
    x = make_inputs(case)
    replay = parse_replay(shlex.split(command)[3:])
    for mine, theirs in ((x.q, replay.q), (x.k, replay.k), (x.v, replay.v)):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    assert x.mask is not None
    assert replay.mask is not None
    assert torch.equal(x.mask.expand_as(replay.mask), replay.mask)


@pytest.mark.thorough
def test_the_command_itself_works_and_needs_no_saved_inputs() -> None:
    _, report, command = fail(*CASES["plain"], other_plan=False)
    words = [word for word in shlex.split(command)[1:] if not word.startswith("inputs=")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    kept = [line for line in report.splitlines() if "replay" not in line]
    assert [line for line in done.stdout.splitlines() if "replay" not in line][2:] == kept

    healthy = [word for word in words if not word.startswith("plant=")]
    done = subprocess.run([sys.executable, *healthy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no alarm" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "nonsense"),
        (["seed=1"], "batch is missing"),
        (["plant=nobody"], "nobody"),
        (["colour=red"], "colour"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(words: list[str], message: str) -> None:
    _, _, command = fail(*CASES["plain"], other_plan=False)
    good = [] if words == ["seed=1"] else shlex.split(command)[3:]
    with pytest.raises(ValueError, match=message):
        parse_replay([*good, *words])


def test_every_field_of_a_problem_survives_the_command_line() -> None:
    """A new field of Problem must not be lost: it is printed unless a default is declared."""
    case, gate, plant = CASES["views, mask, gqa"]
    x = make_inputs(case)
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options())
    _, _, command = fail(case, gate, plant, other_plan=False)
    assert dataclasses.asdict(parse_replay(shlex.split(command)[3:]).problem) == (
        dataclasses.asdict(problem)
    )
