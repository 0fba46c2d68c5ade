"""Test that isolate takes the backward kernels apart: right kernels are right, and the first wrong
tensor and value of a planted bug are named. tests/plants/test_planted_bugs.py has every bug."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from flashcore.checks.varlen_cases import VarlenCase
from flashcore.cli.app import app
from flashcore.isolate import gates
from flashcore.isolate.backward import isolate_backward
from flashcore.isolate.backward_calls import PaddedCase
from flashcore.isolate.choosing import kernel_to_run
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL
from flashcore.problem.case import Case

CASE = Case(num_heads_q=2, num_heads_kv=1, seqlen_q=70, seqlen_k=50, head_dim=32, head_dim_v=32)
BFLOAT16 = {"dtype": "bfloat16", "causal": "lower_right"}  # and rows that see nothing
SOFTCAP = {"softcap": 3.0, "mask": "additive", "head_dim_v": 40}
ODD = {"head_dim": 20, "head_dim_v": 20, "window": (20, 5), "mask": "bool"}


@pytest.mark.parametrize("options", [BFLOAT16, SOFTCAP, ODD], ids=["bfloat16", "softcap", "20"])
def test_right_kernels_are_right(options: dict[str, object]) -> None:
    case = Case(**{**vars_of(CASE), **options})
    found = isolate_backward(case, DQ_KERNEL)
    assert found.ok, found.why
    assert [result.stage for result in found.stages] == ["delta", "dq", "dv", "dk"]
    assert [result.status for result in found.stages] == ["ok"] * 4


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


@pytest.mark.parametrize("case", [PADDED, PACKED], ids=["padded", "packed"])
def test_sequences_of_different_lengths_are_right(case: Case | VarlenCase) -> None:
    found = isolate_backward(case, DKDV_KERNEL)
    assert found.ok, found.why
    assert [result.status for result in found.stages] == ["ok"] * 4


def test_the_first_wrong_value_is_named() -> None:
    """Without its scale dk alone is wrong, by 1 / scale, from the first key on."""
    found = gates.isolate(CASE, "sim", plant="scale-forgotten")
    assert (found.kernel, found.first_wrong) == (DKDV_KERNEL, "dk")
    assert [result.status for result in found.stages] == ["ok", "ok", "ok", "wrong"]
    check = found.stages[-1].first_bad_check()
    assert check is not None
    first = check.first
    assert first is not None
    assert (first.batch, first.head, first.row, first.n_block, first.m_block) == (0, 0, 0, 0, None)
    assert first.actual / first.expected == pytest.approx(32**0.5, rel=0.02)
    assert "key 0, column" in first.describe()
    assert any("score_gradient" in reason for reason in found.why)


def test_the_command_names_kernel_tensor_and_alarm() -> None:
    """An alarm in the first kernel, which nothing is run behind."""
    result = CliRunner().invoke(app, ["isolate", "--plant", "dout-read-late"])
    assert result.exit_code == 1, result.output
    assert "first wrong stage: delta" in result.stdout
    assert DQ_KERNEL in result.stdout
    assert "race" in result.stdout
    assert result.stdout.count("not run") == 3


def test_a_backend_has_the_bugs_of_its_backward_kernels() -> None:
    assert kernel_to_run("sm90", "scale-forgotten") == DKDV_KERNEL
    assert kernel_to_run("sim", "dlse-forgotten") == DQ_KERNEL
    assert kernel_to_run("wmma", "scale-forgotten") == "attn_fwd_wmma"  # which has no such bug


def test_the_list_has_the_backward_kernels() -> None:
    result = CliRunner().invoke(app, ["isolate", "--plant", "list", "--json"])
    assert result.exit_code == 0, result.output
    listed = {(x["name"], x["kernel"]): x["stage"] for x in json.loads(result.stdout)}
    assert listed["dlse-forgotten", DQ_KERNEL] == "delta"
    assert listed["scale-forgotten", DKDV_KERNEL] == "dk"


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
