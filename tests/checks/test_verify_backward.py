"""verify --backward: drawn cases replay, pass on the real thing, and fail on a wrong one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flashcore
from flashcore.checks import gradient_drawing, verify_backward
from flashcore.checks.accuracy import compared
from flashcore.checks.gradient_accuracy import gradient_oracle, gradient_reports, plain_gradients
from flashcore.checks.gradient_drawing import GradientCase, draw_gradients
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.cli import app
from flashcore.problem.case import Case


@pytest.mark.parametrize("backend", ["torch", "sim", "sm90"])
def test_a_case_depends_on_seed_and_index_alone(backend: str) -> None:
    alone = draw_gradients(3, 17, backend)
    in_a_run = [draw_gradients(3, index, backend) for index in range(18)][-1]
    assert alone == in_a_run
    assert alone != draw_gradients(4, 17, backend)


def test_cases_cover_what_breaks_kernels() -> None:
    cases = [draw_gradients(0, index, "wmma") for index in range(300)]
    assert {case.arrives for case in cases} == {"out", "lse", "both"}
    dense = [case.call for case in cases if isinstance(case.call, Case)]
    packed = [case.call for case in cases if isinstance(case.call, VarlenCase)]
    padded = [case for case in cases if case.seqlens_k is not None]
    wanted = {
        "GQA": any(c.num_heads_q > c.num_heads_kv for c in dense),
        "no query": any(c.seqlen_q == 0 for c in dense),
        "no key": any(c.seqlen_k == 0 for c in dense),
        "other v dim": any(c.head_dim_v != c.head_dim for c in dense),
        "unaligned": any(c.offset % 8 for c in dense),
        "window": any(c.window for c in dense),
        "softcap": any(c.softcap for c in dense),
        "large scores": any(c.growth == "far" for c in dense),
        "empty packed sequence": any(0 in c.lengths_k for c in packed),
        "rows behind the last sequence": any(c.tail for c in packed),
        "empty padded sequence": any(0 in (c.seqlens_k or ()) for c in padded),
        "whole padded sequence": any(
            max(c.seqlens_k or (0,)) == getattr(c.call, "seqlen_k", -1) > 0 for c in padded
        ),
    }
    assert [name for name, is_there in wanted.items() if not is_there] == []
    assert {c.mask for c in dense} == {"none", "bool", "padding", "additive"}


def test_the_torch_path_passes() -> None:
    results = verify_backward.verify_backward("torch", seed=1, indices=range(24))
    assert [f"{r.replay}: {r.describe()}" for r in results if not r.ok] == []


@pytest.mark.thorough
def test_the_simulated_kernels_pass() -> None:
    results = verify_backward.verify_backward("sim", seed=1, indices=range(4))
    assert [f"{r.replay}: {r.describe()}" for r in results if not r.ok] == []
    assert results[3].replay == "flashcore verify --backward --backend sim --seed 1 --case 3"


@pytest.mark.thorough
def test_every_configuration_of_the_simulated_kernels_passes() -> None:
    indices = range(2 * gradient_drawing.num_configurations())
    results = verify_backward.verify_backward("sim", seed=2, indices=indices)
    assert [f"{r.replay}: {r.describe()}" for r in results if not r.ok] == []


@pytest.mark.thorough
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("neighbour-lse", "scale-forgotten", "stale-stats"):
        case = GradientCase(
            call=Case(seqlen_q=100, seqlen_k=70, head_dim=32, head_dim_v=32),
            arrives="both",
            tiles=gradient_drawing._SMALL,
        )
        monkeypatch.setattr(verify_backward, "draw_gradients", lambda *_, case=case: case)
        (result,) = verify_backward.verify_backward("sim", indices=[0], plant=name)
        assert not result.ok, name
        assert result.replay.endswith(f"--plant {name}")
        (right,) = verify_backward.verify_backward("sim", indices=[0])
        assert right.ok, right.describe()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["wmma", "auto"])  # "auto": sm90 on a Hopper GPU
def test_the_gradients_on_the_gpu_pass(backend: str) -> None:
    results = verify_backward.verify_backward(backend, seed=1, indices=range(30))
    assert [f"{r.replay}: {r.describe()}" for r in results if not r.ok] == []


class Changed(torch.autograd.Function):
    """Hand q, k and v on, and change a gradient on its way back."""

    name = "dq"

    @staticmethod
    def forward(ctx: Any, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in qkv)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs = zip(("dq", "dk", "dv"), gradients, strict=True)
        return tuple(x * 1.05 if name == Changed.name else x for name, x in pairs)


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
@pytest.mark.parametrize("kind", ["dense", "keys", "packed"])
def test_a_wrong_gradient_fails_and_is_named(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call: Case | VarlenCase = Case(seqlen_q=40, seqlen_k=50, batch=2)
    if kind == "packed":
        call = VarlenCase(lengths_q=(20, 30), lengths_k=(40, 20))
    case = GradientCase(call=call, seqlens_k=(50, 30) if kind == "keys" else None)
    monkeypatch.setattr(verify_backward, "draw_gradients", lambda *_: case)
    monkeypatch.setattr(Changed, "name", name)
    for module, function in ((flashcore, "attention"), (verify_backward, "attention_varlen")):
        right = getattr(module, function)

        def wrong(*args: Any, right: Any = right, **options: Any) -> Any:
            return right(*Changed.apply(*args[:3]), *args[3:], **options)

        monkeypatch.setattr(module, function, wrong)
    (result,) = verify_backward.verify_backward("torch", indices=[0])
    assert not result.ok
    assert result.describe().startswith(name)
    assert ("sequence 0" in result.describe()) == (kind != "dense")
    monkeypatch.setattr(Changed, "name", "none")
    assert verify_backward.verify_backward("torch", indices=[0])[0].ok


def test_gradients_behind_a_sequence_have_to_be_zero() -> None:
    zeros, tiny = torch.zeros(3), torch.tensor([0.0, 1e-30, 0.0])
    assert verify_backward._zero(zeros, "dk").ok
    assert not verify_backward._zero(tiny, "dk").ok
    assert not verify_backward._zero(zeros * math.nan, "dk").ok


def test_the_oracle_of_gradients_agrees_with_finite_differences() -> None:
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 5, 5, 3))
    dlse = torch.randn(1, 2, 3, dtype=torch.float64)
    options: dict[str, Any] = {"causal": True, "softcap": 1.5, "scale": 0.7}

    def loss(*qkv: torch.Tensor) -> float:
        from flashcore.checks.reference import attention_oracle

        out, lse = attention_oracle(*qkv, **options)
        return float((out * dout).sum() + (lse * dlse).sum())

    found = gradient_oracle(q, k, v, dout, dlse, **options)
    for number, x in enumerate((q, k, v)):
        for place in range(0, x.numel(), 3):
            step = torch.zeros_like(x)
            step.view(-1)[place] = 1e-6
            above, below = ([*(q, k, v)] for _ in range(2))
            above[number], below[number] = x + step, x - step
            slope = (loss(*above) - loss(*below)) / 2e-6
            assert float(found[number].reshape(-1)[place]) == pytest.approx(slope, abs=1e-7)


def test_what_arrives_at_rows_that_see_nothing_changes_nothing() -> None:
    q, k, v = (torch.randn(1, 1, n, 8, dtype=torch.bfloat16) for n in (5, 3, 3))
    dout, dlse = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5)
    want = gradient_oracle(q, k, v, dout, dlse, causal=True)  # the first two rows
    dout[:, :, :2], dlse[:, :, :2] = math.nan, math.nan
    for gradients in (gradient_oracle, plain_gradients):
        found = gradients(q, k, v, dout, dlse, causal=True)
        assert all(bool(x.isfinite().all()) for x in found)
    found = gradient_oracle(q, k, v, dout, dlse, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert not found[0][:, :, :2].any()
    reports = gradient_reports(found, q, k, v, dout, dlse, causal=True)
    assert all(report.ok for report in reports)
    assert [str(report)[:3] for report in reports] == ["dq:", "dk:", "dv:"]


def test_the_rule_is_twice_the_plain_error_and_a_little() -> None:
    want, plain = torch.zeros(4, dtype=torch.float64), torch.full((4,), 1e-3)
    for error, ok in ((2.0e-3, True), (2.02e-3, False), (math.nan, False)):
        assert compared(torch.full((4,), error), want, plain, torch.float16).ok is ok
    exact = torch.zeros(4)
    assert not compared(torch.full((4,), 3e-5), want, exact, torch.float16).ok
    assert compared(torch.full((4,), 3e-5), want, exact, torch.float16, slack=4.0).ok


def test_the_command_says_what_it_checked() -> None:
    done = CliRunner().invoke(
        app, ["verify", "--backward", "--backend", "torch", "--cases", "3", "--json"]
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["passed"] == 3
    assert {case["case"]["arrives"] for case in document["cases"]} <= {"out", "lse", "both"}
