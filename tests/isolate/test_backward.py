"""Test that isolate takes the backward kernels apart: right kernels are right, and the first wrong
stage and value of a planted bug are named, and that alarms can be replayed.
tests/plants/test_planted_bugs.py has every bug."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from flashcore.checks.gradient_drawing import draw_gradients
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.checks.verify_backward import verify_backward
from flashcore.cli.app import app
from flashcore.cli.calls import isolate as isolate_call
from flashcore.compile.codegen import KERNELS_DIR
from flashcore.isolate import gates, registry
from flashcore.isolate.backward import isolate_backward
from flashcore.isolate.backward_calls import PaddedCase, padded_case
from flashcore.isolate.choosing import kernel_to_run
from flashcore.kernels.bwd_sm90.kernel import DKDV, DQ, BwdSm90Kernel
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim.__main__ import main
from flashcore.sim.plants import index
from flashcore.sim.replay import parse_replay

CASE = Case(num_heads_q=2, num_heads_kv=1, seqlen_q=70, seqlen_k=50, head_dim=32, head_dim_v=32)
BFLOAT16 = {"dtype": "bfloat16", "causal": "lower_right"}  # and rows that see nothing
SOFTCAP = {"softcap": 3.0, "mask": "additive", "head_dim_v": 40}
ODD = {"head_dim": 20, "head_dim_v": 20, "window": (20, 5), "mask": "bool"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(BFLOAT16, id="bfloat16", marks=pytest.mark.thorough),
        pytest.param(SOFTCAP, id="softcap", marks=pytest.mark.thorough),
        pytest.param(ODD, id="20", marks=pytest.mark.thorough),
    ],
)
def test_right_kernels_are_right(options: dict[str, object]) -> None:
    case = Case(**{**vars_of(CASE), **options})
    found = isolate_backward(case, DQ_KERNEL)
    assert found.ok, found.why
    assert [result.stage for result in found.stages] == ["delta", "ds", "dv", "dk", "dq", "full"]
    assert [result.status for result in found.stages] == ["ok"] * 6


def vars_of(case: Case) -> dict[str, object]:
    return {name: getattr(case, name) for name in case.__dataclass_fields__}


PADDED = PaddedCase(
    batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=40, seqlen_k=80, head_dim=32, head_dim_v=32,
    window=(-1, 5), lengths_k=(80, 33),
)  # fmt: skip
PACKED = VarlenCase(
    lengths_q=(30, 0, 9), lengths_k=(40, 12, 70), num_heads_kv=1, head_dim=32, head_dim_v=32,
    causal="lower_right", tail=5,
)  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("case", [PADDED, PACKED], ids=["padded", "packed"])
def test_sequences_of_different_lengths_are_right(case: Case | VarlenCase) -> None:
    found = isolate_backward(case, DKDV_KERNEL)
    assert found.ok, found.why
    assert [result.status for result in found.stages] == ["ok"] * 6


@pytest.mark.thorough
@pytest.mark.parametrize("arrives", ["out", "lse"])
def test_gradients_may_arrive_through_one_alone(arrives: str) -> None:
    found = isolate_backward(CASE, arrives=arrives)
    assert found.ok, found.why


ONE = {"block_m": 64, "block_n": 64, "also_dq": True}


@pytest.mark.thorough
def test_one_kernel_for_dq_dk_and_dv_has_the_same_stages() -> None:
    found = isolate_backward(CASE, tile=ONE)
    assert found.ok, found.why
    assert [result.status for result in found.stages] == ["ok"] * 6
    assert "attn_bwd_round_sm90" in next(x.plan for x in found.stages if x.stage == "dq")


def test_the_first_wrong_value_is_named() -> None:
    """Without its scale dk alone is wrong, by 1 / scale, from the first key on."""
    found = gates.isolate(CASE, "sim", plant="scale-forgotten")
    assert (found.kernel, found.first_wrong) == (DKDV_KERNEL, "dk")
    status = {result.stage: result.status for result in found.stages}
    assert [name for name, x in status.items() if x == "wrong"] == ["dk", "full"]
    check = next(x for x in found.stages if x.stage == "dk").first_bad_check()
    assert check is not None
    first = check.first
    assert first is not None
    assert (first.batch, first.head, first.row, first.n_block, first.m_block) == (0, 0, 0, 0, None)
    assert first.actual / first.expected == pytest.approx(32**0.5, rel=0.02)
    assert "key 0, column" in first.describe()
    assert any("issue_dk" in reason for reason in found.why)


@pytest.mark.thorough
def test_a_wrong_ds_is_named_where_the_kernel_holds_it() -> None:
    """S is computed from V instead of K: all of dS^T is wrong, and no product behind it. The first
    wrong value is that of key 0 and row 0, which lane 0 of the first consumer has."""
    found = gates.isolate(CASE, "sim", plant="swapped-operand")
    assert found.first_wrong == "ds"
    status = {result.stage: result.status for result in found.stages}
    assert [name for name, x in status.items() if x != "ok"] == ["ds", "full"]
    of_dq, of_dkdv = next(x for x in found.stages if x.stage == "ds").checks
    assert of_dq.ok
    assert of_dkdv.name == f"ds of {DKDV_KERNEL}"
    first = of_dkdv.first
    assert first is not None
    assert (first.row, first.column, first.m_block, first.n_block) == (0, 0, 0, 0)
    assert (first.warp, first.lane, first.element) == (4, 0, 0)
    assert "key     0 warp  4" in of_dkdv.picture


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["isolate", *words])


@pytest.mark.thorough
def test_the_command_names_kernel_stage_and_alarm() -> None:
    result = run("--plant", "dout-read-late")
    assert result.exit_code == 1, result.output
    assert "first wrong stage: delta" in result.stdout
    assert DQ_KERNEL in result.stdout
    assert "race" in result.stdout


@pytest.mark.thorough
def test_the_command_takes_the_backward_apart_and_a_case_of_verify() -> None:
    shape = [
        "--seqlen",
        "20",
        "--seqlen-k",
        "30",
        "--head-dim",
        "16",
        "--heads-kv",
        "1",
        "--causal",
    ]
    result = run("--backward", "--backend", "sim", "--tile", "dq:64x32", *shape)
    assert result.exit_code == 0, result.output
    assert "all stages are right" in result.stdout
    drawn = draw_gradients(3, 2, "sim")
    chosen = isolate_call.drawn(3, 2, "sim", DKDV_KERNEL, None, is_on_gpu=False)
    assert chosen.case == padded_case(drawn.call, drawn.seqlens_k)
    assert chosen.arguments["tiles"] == tuple(tile._asdict() for tile in drawn.tiles)


@pytest.mark.thorough
def test_a_case_that_verify_finds_wrong_is_one_that_isolate_takes_apart() -> None:
    (found,) = verify_backward("sim", indices=[1], plant="scale-forgotten")
    assert not found.ok
    assert found.isolate is not None
    result = run(*found.isolate.split()[2:])
    assert result.exit_code == 1, result.output
    assert "first wrong stage: dK = scale dS^T Q (gate dk)" in result.stdout


def test_an_alarm_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    planted = registry.find_plant("dout-read-late", "sim")
    found = gates.isolate(planted.case(CASE), "sim", plant="dout-read-late", tile=planted.tile)
    alarm = found.stages[0].alarm
    assert alarm is not None
    report = alarm.text
    command = report.partition("replay ")[2].split()
    assert command[:3] == ["python", "-m", "flashcore.sim"]
    assert main(command[3:]) == 1
    assert report in capsys.readouterr().out
    healthy = [word for word in command[3:] if not word.startswith(("plant=", "gate="))]
    assert main(healthy) == 0
    assert "largest difference from PyTorch in float64: 0.0" in capsys.readouterr().out


def test_a_replay_without_its_inputs_says_so() -> None:
    words = "batch=1 num_heads_q=1 num_heads_kv=1 seqlen_q=9 seqlen_k=9 head_dim=16 head_dim_v=16"
    words += (
        " dtype=float16 scale=0.25 q_strides=1,1,1 k_strides=1,1,1 v_strides=1,1,1 load_bytes=16"
        " batch_invariant=False deterministic=True"
    )
    with pytest.raises(ValueError, match="is no file: a backward kernel is replayed on the out"):
        parse_replay([f"kernel={DQ_KERNEL}", "inputs=/nowhere.pt", *words.split()])
    with pytest.raises(ValueError, match="kernel='attn_bwd' is not one of"):
        parse_replay(["kernel=attn_bwd", *words.split()])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [BFLOAT16, SOFTCAP, {"head_dim": 192, "head_dim_v": 192}],
    ids=["0", "softcap", "192"],
)
def test_every_stage_is_right_on_the_gpu(options: dict[str, object]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the backward kernels need an sm_90 GPU")
    case = Case(**{**vars_of(CASE), "seqlen_q": 600, "seqlen_k": 500, **options})
    found = gates.isolate(case, "sm90", kernel=DKDV_KERNEL)
    assert found.ok, found.why


@pytest.mark.gpu
@pytest.mark.parametrize("case", [PADDED, PACKED], ids=["padded", "packed"])
def test_lengths_have_every_stage_on_the_gpu(case: Case | VarlenCase) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the backward kernels need an sm_90 GPU")
    found = gates.isolate(case, "sm90", kernel=DKDV_KERNEL)
    assert found.ok, found.why


@pytest.mark.gpu
def test_one_kernel_has_every_stage_on_the_gpu() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the backward kernels need an sm_90 GPU")
    case = Case(seqlen_q=600, seqlen_k=500, causal="lower_right")
    found = gates.isolate(case, "sm90", kernel=DKDV_KERNEL, tile={"also_dq": True})
    assert found.ok, found.why


# With head_dim 128 two consumers share dq, and each part of a tile has two threads that may add it.
@pytest.mark.parametrize(
    ("kernel", "head_dim", "sums_full"), [(DQ, 64, 0), (DKDV, 64, 2), (DKDV, 128, 4)]
)
def test_mbarriers_have_the_names_of_the_kernels_members(
    kernel: BwdSm90Kernel, head_dim: int, sums_full: int
) -> None:
    """They are as many as `Barriers` says, in its order."""
    file = "bwd_dq_sm90.cuh" if kernel is DQ else "bwd_dkdv_sm90.cuh"
    text = (KERNELS_DIR / "bwd_sm90" / file).read_text(encoding="utf-8")
    body = re.search(r"struct Barriers \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    code = re.sub(r"//.*", "", body[1])
    members = [
        name
        for line in re.findall(r"SmemPtr<uint64_t> ([^;]*);", code)
        for name in line.split(", ")
    ]
    plan = kernel.chosen(
        Problem.from_tensors(*[torch.empty(1, 1, 64, head_dim, dtype=torch.float16)] * 3)
    )
    if plan.owns_keys:
        plan = dataclasses.replace(plan, block_n=128, also_dq=True, ds_stages=2)
    places = kernel.barrier_places(plan)
    assert list(dict.fromkeys(name for name, _ in places)) == members
    found = re.search(r"constexpr int NUM_BARRIERS =([^;]*);", text)
    assert found is not None
    count = found[1].replace("NUM_SLOTS", str(plan.dq_buffers[0] * plan.num_consumers))
    count = count.replace("NUM_DS_TILES", str(plan.ds_stages * plan.owns_keys))
    count = count.replace("NUM_SUMS_FULL", str(sums_full))
    count = count.replace("NUM_PLACES", str(2 * plan.also_dq))
    count = re.sub(r"\bNUM_STAGES", str(plan.num_stages), count)
    count = re.sub(r"NUM_(V|DO)_STAGES", str(plan.other_stages), count)
    assert eval(f"({count})") == len(places)


def test_a_backend_has_the_bugs_of_its_backward_kernels() -> None:
    assert kernel_to_run("sm90", "scale-forgotten") == DKDV_KERNEL
    assert kernel_to_run("sim", "dlse-forgotten") == DQ_KERNEL
    assert kernel_to_run("wmma", "scale-forgotten") == "attn_fwd_wmma"  # which has no such bug
    assert kernel_to_run("sim", backward=True) == DKDV_KERNEL
    with pytest.raises(ValueError, match="backend='wmma' has no backward kernels"):
        kernel_to_run("wmma", backward=True)
    with pytest.raises(ValueError, match="'pv-atomic' is a bug of no backward kernel"):
        kernel_to_run("sim", "pv-atomic", backward=True)


def test_the_list_has_the_backward_kernels() -> None:
    result = CliRunner().invoke(app, ["isolate", "--plant", "list", "--json"])
    assert result.exit_code == 0, result.output
    listed = {(x["name"], x["kernel"]): x["stage"] for x in json.loads(result.stdout)}
    assert listed["dlse-forgotten", DQ_KERNEL] == "delta"
    assert listed["scale-forgotten", DKDV_KERNEL] == "dk"
    assert {name for name, _ in listed} == set(index.names())


@pytest.mark.parametrize(
    ("case", "tile", "message"),
    [
        (Case(seqlen_q=0), {}, "nothing to compute"),
        (Case(dtype="float32"), {}, "float16 and bfloat16"),
        (CASE, {"ping_pong": True}, "no field"),
        (CASE, {"block_m": 72}, "can have"),
    ],
)
def test_wrong_requests_say_why(case: Case, tile: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        isolate_backward(case, DQ_KERNEL, tile=tile)


def test_an_architecture_that_is_not_hopper_is_refused() -> None:
    with pytest.raises(ValueError, match="sm_90 alone"):
        gates.isolate(CASE, "sim", plant="scale-forgotten", arch=80)
