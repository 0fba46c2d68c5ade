"""Test dq, dk and dv by one kernel for Hopper, in the simulator: no alarm and right gradients,
whatever the shape, the options and the schedule."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from parameters import thorough_but

import flashcore
from flashcore.backends import backward_sm90
from flashcore.backends import gradients as gradients_module
from flashcore.backends.backward_sm90 import fused_backward
from flashcore.backends.gradients import choose_backward
from flashcore.base import gradient_workspace
from flashcore.checks.cases import Case, make_inputs
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.kernel import DKDV
from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
from flashcore.kernels.bwd_sm90.plan_one import (
    OneKernelPlans,
    make_plans,
    obstacle,
    select_one_kernel_plans,
)
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.kernels.limits import smem_limits
from flashcore.problem import Problem
from flashcore.problem.memory_layout import mask_spec
from flashcore.sim.run_bwd import simulate_backward

CAUSAL = {"causal": "lower_right", "dtype": "bfloat16"}
# name -> (tile, buffers of dS, what is fixed). Between them: 64 and 128 rows a tile, one and two
# consumers, both swizzles, every schedule of the products, dq by a warpgroup and shared.
FAMILIES: dict[str, tuple[BwdTile | None, int, dict[str, Any]]] = {
    "plain": (None, 1, {"head_dim": 64, "head_dim_v": 64}),
    "wide": (
        None,
        2,
        {"head_dim": 128, "head_dim_v": 128, **CAUSAL},
    ),
    "shared": (None, 1, {"head_dim": 120, "head_dim_v": 80, "num_heads_q": 4}),
    "grouped": (
        BwdTile(64, 128, 3, 2, True, False, False),
        2,
        {"head_dim": 40, "head_dim_v": 48, "num_heads_q": 4, "num_heads_kv": 2, **CAUSAL},
    ),
    "narrow-chunks": (
        BwdTile(64, 64, 1, 1, False, False, True),
        1,
        {"head_dim": 96, "head_dim_v": 80, "causal": "upper_left"},
    ),
    "window": (
        BwdTile(128, 128, 2, 2, True, True, False),
        1,
        {"head_dim": 32, "head_dim_v": 32, "window": (40, 20)},
    ),
    "shared-window": (None, 1, {"head_dim": 104, "head_dim_v": 104, "window": (70, 20)}),
    "padded": (None, 1, {"head_dim": 72, "head_dim_v": 88, "num_heads_q": 4}),
    "padded-causal": (None, 1, {"head_dim": 88, "head_dim_v": 72, **CAUSAL}),
    "softcap": (None, 2, {"head_dim": 64, "head_dim_v": 40, "softcap": 3.0}),
    "softcap-causal": (None, 1, {"head_dim": 80, "head_dim_v": 72, "softcap": 2.0, **CAUSAL}),
    "shared-softcap": (
        None,
        2,
        {"head_dim": 104, "head_dim_v": 104, "softcap": 4.0, "dtype": "bfloat16"},
    ),
    "shared-softcap-window": (
        None,
        2,
        {"head_dim": 128, "head_dim_v": 128, "softcap": 3.0, "window": (70, 20)},
    ),
}
BASE = {
    "batch": 2,
    "num_heads_q": 2,
    "num_heads_kv": 2,
    "seqlen_q": 170,
    "seqlen_k": 150,
}
SEEDS = range(3)
HEADS = {"batch": 1, "num_heads_q": 4, "num_heads_kv": 2}


def plans_of(problem: Problem, tile: BwdTile | None, ds_stages: int) -> OneKernelPlans:
    if tile is None:
        return select_one_kernel_plans(problem)
    return make_plans(tile, traits(problem) | {"folds_heads": 0}, ds_stages)


def check(case: Case, tile: BwdTile | None = None, ds_stages: int = 1, seed: int = 0) -> None:
    """Assert that there is neither an alarm nor a wrong result. Gradients that arrive at rows
    that see nothing are NaN."""
    x = make_inputs(case)
    generator = torch.Generator().manual_seed(case.seed)
    problem, out, lse = forward(x.q, x.k, x.v, None, case.options())
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=generator) if seed % 2 else None
    empty = lse == -math.inf
    dout = dout.masked_fill(empty[..., None], math.nan)
    dlse = None if dlse is None else dlse.masked_fill(empty, math.nan)
    inputs = x.q, x.k, x.v, None

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors, seed=seed)

    plans = plans_of(problem, tile, ds_stages)
    found = fused_backward(problem, *inputs, out, lse, dout, dlse, run, plans)
    wrong = wrong_gradients(found, *inputs, dout, dlse, case.options())
    assert not wrong, f"{case.describe()}: {wrong}\n{dataclasses.asdict(case)}"


# dq shared and by a warpgroup, heads of a group, 128 rows a tile: one and a half seconds each.
@pytest.mark.parametrize("name", thorough_but(("grouped",), FAMILIES))
def test_the_kernels_are_healthy_and_right(name: str) -> None:
    tile, ds_stages, fixed = FAMILIES[name]
    for seed in SEEDS:
        check(Case(**(BASE | fixed), seed=seed), tile, ds_stages, seed)


LENGTHS = (1, 1), (1, 300), (300, 1), (193, 64), (64, 193)


@pytest.mark.parametrize("lengths", thorough_but([(1, 1), (193, 64)], LENGTHS))
def test_lengths_that_leave_tiles_nearly_empty(lengths: tuple[int, int]) -> None:
    """Keys behind the last have p = exp(-lse), which is infinite where lse is below -89: none of
    that may get into dq."""
    for causal in ("none", "lower_right"):
        case = Case(seqlen_q=lengths[0], seqlen_k=lengths[1], causal=causal, spread=30.0)
        check(case, seed=1)


def test_rows_whose_scores_are_far_below_zero() -> None:
    """lse -200: exp(0 - lse) overflows for keys that do not exist, and 0 * inf would be NaN."""
    x = make_inputs(Case(seqlen_q=192, seqlen_k=70, head_dim=32, head_dim_v=32))
    x.q[:, :, :, 0], x.k[:, :, :, 0] = 60.0, -20.0
    problem, out, lse = forward(x.q, x.k, x.v, None, {})
    assert lse.max() < -150.0
    dout = torch.ones_like(out)

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors)

    plans = select_one_kernel_plans(problem)
    found = fused_backward(problem, x.q, x.k, x.v, None, out, lse, dout, None, run, plans)
    assert not wrong_gradients(found, x.q, x.k, x.v, None, dout, None, {})


def test_consumers_that_share_dq_need_two_buffers_of_ds_and_one_order() -> None:
    """With one buffer each would wait for the other for ever."""
    q, k, v = (torch.randn(1, 2, 16, 128, dtype=torch.float16) for _ in range(3))
    plan = select_one_kernel_plans(forward(q, k, v, None, {})[0]).main
    assert DKDV.with_tile(plan, {"ds_stages": 3}).ds_stages == 3
    for tile in ({"ds_stages": 1}, {"block_m": 128}, {"early_dp": True}, {"overlaps": False}):
        with pytest.raises(ValueError, match="share dq"):
            DKDV.with_tile(plan, tile)


def test_what_one_kernel_cannot_do_says_why() -> None:
    q, k, v = (torch.randn(1, 2, 16, 64, dtype=torch.float16) for _ in range(3))
    problem = forward(q, k, v, None, {})[0]
    assert obstacle(problem) is None
    for changed, word in (
        ({"head_dim": 136}, "128"),
        ({"head_dim_v": 104}, "above head_dim_v 96"),
        ({"softcap": 1.0, "mask": mask_spec(torch.ones(16, 16).bool())}, "soft-capping"),
    ):
        assert word in (obstacle(dataclasses.replace(problem, **changed)) or "")


@pytest.mark.parametrize("head_dim", [32, 104])
def test_the_bits_are_the_same_whatever_the_schedule_and_the_shares(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tiles of keys; heads of a group; all heads at once, and a share at a time."""
    x = make_inputs(Case(seqlen_q=200, seqlen_k=450, head_dim=head_dim, head_dim_v=16, **HEADS))
    options: dict[str, Any] = {"window": (300, 30)}
    problem, out, lse = forward(x.q, x.k, x.v, None, options)
    dout = torch.randn_like(out)
    ran: list[tuple[int, int] | None] = []

    def gradients(seed: int) -> list[torch.Tensor]:
        def run(problem, plan, tensors) -> None:
            ran.append(plan.heads)
            simulate_backward(problem, plan, tensors, seed=seed)

        plans = select_one_kernel_plans(problem)
        given = problem, x.q, x.k, x.v, None, out, lse, dout, None
        return list(fused_backward(*given, run, plans))

    first = gradients(0)
    assert not wrong_gradients(first, x.q, x.k, x.v, None, dout, None, options)
    for seed in (1, 2):
        assert all(map(torch.equal, gradients(seed), first))
    ran.clear()
    of_head = math.prod(plan_one.sums_shape(problem, 1)) * 4
    monkeypatch.setattr(gradient_workspace, "_num_bytes", of_head)
    assert all(map(torch.equal, gradients(3), first))
    assert ran == [None, (0, 1), (0, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_fit_with_every_head_dim(dtype: torch.dtype) -> None:
    limit = smem_limits(90)[0]
    dims = range(8, plan_one.HEAD_DIM_MAX + 8, 8)
    for head_dim, head_dim_v in itertools.product(dims, dims):
        x, v = (torch.empty(1, 1, 64, d, dtype=dtype) for d in (head_dim, head_dim_v))
        for causal, softcap in itertools.product((False, True), (None, 3.0)):
            problem = Problem.from_tensors(x, x, v, causal=causal, softcap=softcap)
            if obstacle(problem) is None:
                plan = select_one_kernel_plans(problem).main
                assert plan.smem_bytes <= limit, plan.describe()


def test_the_workspace_is_shared_out_evenly() -> None:
    q = torch.empty(3, 8, 130, 64, dtype=torch.float16, device="meta")
    k = torch.empty(3, 2, 300, 64, dtype=torch.float16, device="meta")
    problem = Problem.from_tensors(q, k, k)
    of_head = 4 * 3 * 64 * 64 * 4
    assert plan_one.sums_shape(problem, 1) == (4, 3, 4096)
    assert plan_one.shares(problem, 6 * of_head) == [(0, 6)]
    assert plan_one.shares(problem, 6 * of_head - 1) == [(0, 3), (3, 3)]
    assert plan_one.shares(problem, 0) == [(i, 1) for i in range(6)]
    for tiles, num_bytes, pays in (
        (18, 6 * of_head, True), (19, 6 * of_head, False), (18, 6 * of_head - 1, False),
        (3, of_head, True), (1, of_head - 1, False), (1, 0, False),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan_one, "least_tiles", lambda problem, tiles=tiles: tiles)
            assert plan_one.pays(problem, num_bytes) == pays


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (True, TypeError, "num_bytes is True"),
        (1.5, TypeError, "num_bytes is 1.5"),
        (-1, ValueError, "num_bytes is -1; pass 0 to"),
        (1 << 41, ValueError, "pass 0 to 1099511627776"),
    ],
)
def test_no_workspace_of_that_size(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flashcore.set_gradient_workspace(value)


def test_one_kernel_computes_where_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    leaves = [torch.randn(1, 1, 70, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    problem = Problem.from_tensors(*leaves, return_lse=True)
    ran: list[str] = []
    real = backward_sm90.run_in_simulator

    def run(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, torch.Tensor]) -> None:
        ran.append(plan.kernel)
        real(problem, plan, tensors)

    monkeypatch.setattr(gradients_module, "run_in_simulator", run)

    def gradients() -> tuple[str, tuple[torch.Tensor, ...]]:
        reason = choose_backward(problem, backend="sim").reason
        out = flashcore.attention(*leaves, backend="sim")
        return reason, torch.autograd.grad(out, leaves, torch.ones_like(out))

    reason, by_two = gradients()
    assert reason == "fused kernels for Hopper, deterministic"
    ran.clear()
    monkeypatch.setattr(plan_one, "least_tiles", lambda problem: 1)
    reason, by_one = gradients()
    assert reason == "one fused kernel for Hopper, deterministic"
    assert ran == ["attn_bwd_delta_sm90", "attn_bwd_dkdv_sm90", "attn_bwd_round_sm90"]
    for x, y in zip(by_one, by_two, strict=True):
        torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)
    monkeypatch.setattr(gradient_workspace, "_num_bytes", 0)
    assert choose_backward(problem, backend="sim").reason.startswith("fused kernels for Hopper")


@pytest.mark.parametrize(
    ("head_dim", "seqlen", "heads", "options", "pays"),
    [
        (64, 2048, 16, {}, True),
        (64, 2048, 15, {}, False),
        (96, 1024, 64, {"causal": True}, True),
        (96, 1024, 63, {"causal": True}, False),
        (64, 1024, 32, {}, True),
        (64, 1023, 63, {}, False),  # of fewer than 64 heads too many tiles run at a time
        (64, 1023, 64, {}, True),
        (96, 512, 127, {}, False),
        (96, 512, 128, {"causal": True}, True),
        (128, 512, 255, {}, False),
        (128, 512, 256, {}, True),
        (64, 128, 512, {}, True),
        (64, 127, 999, {}, False),
        (64, 4096, 999, {"window": (255, 0)}, True),
        (64, 4096, 64, {"window": (254, 0)}, True),
        (64, 4096, 63, {"window": (254, 0)}, False),
        (64, 4096, 64, {"window": (63, 0)}, True),
        (64, 4096, 999, {"window": (62, 0)}, False),
        (64, 1024, 16, {"softcap": 9.0}, True),
        (64, 1024, 15, {"softcap": 9.0}, False),
        (128, 2048, 32, {"causal": True, "softcap": 9.0}, True),
        (128, 2048, 31, {"causal": True, "softcap": 9.0}, False),
        (64, 4096, 999, {"window": (0, -1)}, True),
        (128, 2048, 31, {}, False),
        (128, 2048, 32, {}, True),
        (128, 2048, 63, {"causal": True}, False),
        (128, 2048, 64, {"causal": True}, True),
        (128, 4096, 32, {"causal": True}, True),
        (128, 4096, 32, {"window": (1024, 0)}, True),
        (64, 2048, 0, {}, False),
        (128, 1 << 20, 8, {}, False),  # one head's sums would take 512 MiB
    ],
)
def test_where_one_kernel_pays(
    head_dim: int, seqlen: int, heads: int, options: dict[str, Any], pays: bool
) -> None:
    x = torch.empty(1, heads, seqlen, head_dim, dtype=torch.bfloat16, device="meta")
    problem = Problem.from_tensors(x, x, x, **options)
    assert plan_one.pays(problem, gradient_workspace.DEFAULT_BYTES) == pays
