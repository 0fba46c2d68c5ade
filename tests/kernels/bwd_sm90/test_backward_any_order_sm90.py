"""Test dq, dk and dv by one kernel whose blocks add to dq in any order, in the simulator: no alarm
and right gradients; and which calls take it: `deterministic=False` reaches the backward pass on
every road, and torch.use_deterministic_algorithms overrides it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from parameters import thorough_but

import flashcore
from flashcore.backends import gradients as gradients_module
from flashcore.backends.backward_sm90 import fused_backward, plans_for, why_in_order
from flashcore.backends.gradients import choose_backward
from flashcore.base import gradient_workspace
from flashcore.checks.cases import Case, make_inputs
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.plan import BwdPlans, BwdSm90Plan
from flashcore.kernels.bwd_sm90.plan_one import in_any_order, select_one_kernel_plans
from flashcore.problem import Problem
from flashcore.problem.options import Options
from flashcore.sim.run_bwd import simulate_backward

Tensor = torch.Tensor
KERNELS = ["attn_bwd_delta_sm90", "attn_bwd_dkdv_sm90", "attn_bwd_round_sm90"]
BASE: dict[str, Any] = {
    "batch": 1, "num_heads_q": 4, "num_heads_kv": 2, "seqlen_q": 333, "seqlen_k": 301,
    "dtype": "bfloat16",
}  # fmt: skip
CAUSAL = {"causal": "lower_right"}
# dq by a warpgroup of its own, with 128 and 64 rows a tile, and shared by the consumers; heads of a
# group; rows that see no key, whose sums nobody adds to.
FAMILIES: dict[str, dict[str, Any]] = {
    "64": {"head_dim": 64, "head_dim_v": 64},
    "64-causal": {"head_dim": 64, "head_dim_v": 64, **CAUSAL},
    "96": {"head_dim": 96, "head_dim_v": 88},
    "128-causal": {"head_dim": 128, "head_dim_v": 128, "num_heads_q": 2, **CAUSAL},
    "120": {"head_dim": 120, "head_dim_v": 80, "num_heads_q": 2, "dtype": "float16"},
    "empty-rows": {"head_dim": 32, "head_dim_v": 16, "seqlen_q": 600, "window": (140, 20)},
}


def gradients_of(case: Case, seed: int) -> tuple[list[str], list[tuple[int, int] | None]]:
    """Return what is wrong with a case's gradients, and the shares of heads that were launched. The
    sums hold NaN before the first kernel runs."""
    x = make_inputs(case)
    options = case.options()
    problem, out, lse = forward(x.q, x.k, x.v, None, options)
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    dout = dout.masked_fill((lse == -math.inf)[..., None], math.nan)
    shares: list[tuple[int, int] | None] = []

    def run(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
        assert not plan.ordered
        assert "dq_turns" not in tensors
        if not shares:
            tensors["dq_sums"].fill_(math.nan)
        shares.append(plan.heads)
        simulate_backward(problem, plan, tensors, seed=seed)

    plans = in_any_order(select_one_kernel_plans(problem))
    found = fused_backward(problem, x.q, x.k, x.v, None, out, lse, dout, None, run, plans)
    return wrong_gradients(found, x.q, x.k, x.v, None, dout, None, options), shares


@pytest.mark.parametrize("name", thorough_but(("64-causal", "128-causal", "empty-rows"), FAMILIES))
def test_the_kernels_are_healthy_and_right(name: str) -> None:
    for seed in range(3):
        wrong, _ = gradients_of(Case(**(BASE | FAMILIES[name]), seed=seed), seed)
        assert not wrong, f"seed {seed}: {wrong}"


@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (193, 64), (64, 193)])
def test_lengths_that_leave_tiles_nearly_empty(lengths: tuple[int, int]) -> None:
    sizes = {"seqlen_q": lengths[0], "seqlen_k": lengths[1], "head_dim": 32, "head_dim_v": 32}
    assert not gradients_of(Case(**(BASE | sizes), spread=30.0), 1)[0]


def test_sums_are_cleared_for_every_share_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three heads of k by room for two: the first share has one, the second adds where it did."""
    sizes = {"num_heads_q": 3, "num_heads_kv": 3, "head_dim": 32, "head_dim_v": 32}
    case = Case(**(BASE | sizes))
    x = make_inputs(case)
    of_head = math.prod(plan_one.sums_shape(Problem.from_tensors(x.q, x.k, x.v), 1)) * 4
    monkeypatch.setattr(gradient_workspace, "_num_bytes", 2 * of_head)
    wrong, shares = gradients_of(case, 0)
    assert not wrong
    assert shares == [(0, 1)] * 3 + [(1, 2)] * 3


def test_plans_differ_in_the_order_alone() -> None:
    q = torch.empty(1, 16, 4096, 128, dtype=torch.bfloat16, device="meta")
    plans = select_one_kernel_plans(Problem.from_tensors(q, q, q, causal=True))
    assert all(plan.ordered for plan in plans)
    for plan, other in zip(plans, in_any_order(plans), strict=True):
        own, changed = plan.constants(), other.constants()
        assert {name for name in own if own[name] != changed[name]} == {"ORDERED"}
        assert plan.smem_bytes == other.smem_bytes


@pytest.fixture
def determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("determinism")
def test_where_any_order_is_taken() -> None:
    def problem_of(
        seqlen: int, deterministic: bool = False, heads: int = 64, dim: int = 128
    ) -> Problem:
        q = torch.empty(1, heads, seqlen, dim, dtype=torch.bfloat16, device="meta")
        return Problem.from_tensors(q, q, q, deterministic=deterministic)

    assert all(not plan.ordered for plan in plans_for(problem_of(2048)))
    assert why_in_order(problem_of(2048)) is None
    assert all(plan.ordered for plan in plans_for(problem_of(2047)))
    assert all(plan.ordered for plan in plans_for(problem_of(2048, dim=96)))
    assert all(plan.ordered for plan in plans_for(problem_of(2048, deterministic=True)))
    assert isinstance(plans_for(problem_of(2048, heads=1)), BwdPlans)  # nothing is added up
    torch.use_deterministic_algorithms(True)
    assert all(plan.ordered for plan in plans_for(problem_of(2048)))
    assert "use_deterministic_algorithms" in (why_in_order(problem_of(2048)) or "")


@pytest.mark.usefixtures("determinism")
def test_explain_says_which_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    monkeypatch.setattr(plan_one, "least_tiles", lambda problem: 1)
    q = torch.empty(1, 1, 2048, 128, dtype=torch.float16)

    def reason(x: Tensor, **options: Any) -> str:
        text = io.StringIO()
        found = flashcore.explain(x, x, x, backend="sim", file=text, **options)
        assert found.gradient.reason in text.getvalue()
        return found.gradient.reason

    assert reason(q) == "one fused kernel for Hopper, deterministic"
    any_order = (
        "one fused kernel for Hopper, dq added up in any order, as deterministic=False allows"
    )
    assert reason(q, deterministic=False) == any_order
    assert "costs little or nothing here" in reason(q[:, :, :100], deterministic=False)
    torch.use_deterministic_algorithms(True)
    assert "use_deterministic_algorithms" in reason(q, deterministic=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Have every call's gradient taken by one kernel in the simulator, and in any order where that
    is allowed; return where kernels that run are listed, with whether they are ordered."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    monkeypatch.setattr(plan_one, "least_tiles", lambda problem: 1)
    monkeypatch.setattr(plan_one, "any_order_pays", lambda problem: True)
    found: list[tuple[str, bool]] = []
    real = gradients_module.run_in_simulator

    def run(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
        found.append((plan.kernel, plan.ordered))
        real(problem, plan, tensors)

    monkeypatch.setattr(gradients_module, "run_in_simulator", run)
    return found


def leaves_of() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = 1, 2, 70, 32
    return [
        torch.randn(shape, generator=generator).to(torch.float16).requires_grad_() for _ in range(3)
    ]


@pytest.mark.usefixtures("determinism")
@pytest.mark.parametrize("road", ["eager", "lse", "sinks", "rank-3", "compiled", "vmap", "given"])
def test_the_option_reaches_the_backward_pass(road: str, ran: list[tuple[str, bool]]) -> None:
    leaves = leaves_of()
    given: dict[str, Any] = {"backend": "sim"}

    def backward(**options: Any) -> None:
        q, k, v = leaves
        attend: Any = flashcore.attention
        if road == "given":
            out, lse = flashcore.attention(*leaves, return_lse=True, **given)
            with torch.no_grad():
                flashcore.attention_backward(
                    torch.ones_like(out), q, k, v, out, lse, **given, **options
                )
            return
        if road == "sinks":
            options["sinks"] = torch.zeros(2, requires_grad=True)
        if road == "rank-3":
            q, k, v = (x[0] for x in leaves)
        if road == "compiled":
            attend = torch.compile(flashcore.attention, fullgraph=True, backend="aot_eager")
        if road == "vmap":
            out = torch.vmap(lambda *x: flashcore.attention(*x, **given, **options))(
                *(x[None] for x in leaves)
            )
        elif road == "lse":
            out, lse = attend(q, k, v, return_lse=True, **given, **options)
            out = out + lse[..., None].to(out.dtype)
        else:
            out = attend(q, k, v, **given, **options)
        out.sum().backward()

    for options, ordered in (({}, True), ({"deterministic": False}, False)):
        ran.clear()
        backward(**options)
        assert ran == [(kernel, ordered) for kernel in KERNELS]
    torch.use_deterministic_algorithms(True)
    ran.clear()
    backward(deterministic=False)
    assert ran == [(kernel, True) for kernel in KERNELS]


@pytest.mark.usefixtures("determinism")
def test_what_counts_is_what_torch_says_when_the_backward_pass_begins(
    ran: list[tuple[str, bool]],
) -> None:
    out = flashcore.attention(*leaves_of(), backend="sim", deterministic=False)
    torch.use_deterministic_algorithms(True)
    out.sum().backward()
    assert ran == [(kernel, True) for kernel in KERNELS]


@pytest.mark.parametrize("value", [0, 1, None, "False"])
def test_only_true_and_false_are_valid(value: Any) -> None:
    q = torch.randn(1, 1, 8, 16)
    packed, ends = q[0].transpose(0, 1), torch.tensor([0, 8], dtype=torch.int32)
    lengths = torch.tensor([8], dtype=torch.int32)
    for valid in (True, False):  # what was found for these is not found for 1 and 0
        flashcore.attention(q, q, q, deterministic=valid)
        flashcore.attention(q, q, q, seqlens_k=lengths, deterministic=valid)
    for call in (
        lambda: flashcore.attention(q, q, q, deterministic=value),
        lambda: flashcore.attention(q, q, q, seqlens_k=lengths, deterministic=value),
        lambda: flashcore.attention(q, q, q, sinks=torch.zeros(1), deterministic=value),
        lambda: flashcore.attention_varlen(
            packed, packed, packed, ends, ends, 8, 8, deterministic=value
        ),
        lambda: flashcore.explain(q, q, q, deterministic=value),
    ):
        with pytest.raises(TypeError, match="deterministic"):
            call()


def test_elsewhere_it_is_accepted_and_changes_nothing() -> None:
    """Packed and padded sequences, and PyTorch's code."""
    q = torch.randn(1, 2, 30, 16, requires_grad=True)
    ends, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 12, 30], [17]))

    def gradient(deterministic: bool, kind: str) -> Tensor:
        options: dict[str, Any] = {"deterministic": deterministic, "causal": True}
        if kind == "packed":
            x = q[0].transpose(0, 1)
            out = flashcore.attention_varlen(x, x, x, ends, ends, 18, 18, **options)
        else:
            more = {"seqlens_k": lengths} if kind == "padded" else {}
            out = flashcore.attention(q, q, q, **more, **options)
        return torch.autograd.grad(out, q, torch.ones_like(out))[0]

    for kind in ("dense", "padded", "packed"):
        assert torch.equal(gradient(False, kind), gradient(True, kind))


def test_a_problem_gives_its_options_back() -> None:
    q = torch.empty(1, 1, 8, 16)
    for deterministic in (True, False):
        problem = Problem.from_tensors(q, q, q, deterministic=deterministic)
        assert Options.of(problem).deterministic is deterministic
        assert Options.of(problem).asked()["deterministic"] is deterministic
    assert choose_backward(problem).code == "tiled"
