"""Test what holds for gradients whatever the kernels do inside, in the simulator, and that no
schedule of 160 raises an alarm or changes a bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from gradient_rule import forward
from torch import Tensor

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.backends.tiled import attention_tiled
from flashcore.checks.cases import make_inputs
from flashcore.checks.reference import attention_oracle
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.isolate.backward_calls import PaddedCase, backward_call
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.plan import (
    DKDV_KERNEL,
    DQ_KERNEL,
    BwdPlans,
    make_plan,
)
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim.run_bwd import simulate_backward

Tiles = tuple[BwdTile, BwdTile]
SMALL: Tiles = BwdTile(64, 32, 3, 2), BwdTile(32, 64, 3, 2)
CASE = Case(
    num_heads_q=2, num_heads_kv=1, seqlen_q=40, seqlen_k=70, head_dim=32, head_dim_v=32, seed=5
)  # fmt: skip


def plans_of(problem: Problem, tiles: Tiles) -> BwdPlans:
    fields = traits(problem) | {"folds_heads": 0}
    kernels = (DQ_KERNEL, DKDV_KERNEL)
    return BwdPlans(*(make_plan(k, t, fields) for k, t in zip(kernels, tiles, strict=True)))


def gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return dq, dk and dv from given out and lse, by one configuration of the kernels."""
    problem = Problem.from_tensors(q, k, v, return_lse=True)

    def run(problem: Problem, plan: Any, tensors: dict[str, Tensor]) -> None:
        simulate_backward(problem, plan, tensors)

    plans = plans_of(problem, SMALL)
    return fused_backward(problem, q, k, v, None, out, lse, dout, dlse, run, plans)


def call() -> tuple[Tensor, ...]:
    """Return q, k, v, out, lse and dout."""
    x = make_inputs(CASE)
    _, out, lse = forward(x.q, x.k, x.v, None, {})
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return x.q, x.k, x.v, out, lse, dout


def close(have: Tensor, want: Tensor, steps: float = 4.0) -> None:
    """Check a sum that was added up in another order: a few roundings of its largest value."""
    atol = steps * torch.finfo(torch.float16).eps * float(want.abs().max())
    torch.testing.assert_close(have.double(), want.double(), rtol=0.0, atol=atol)


def test_gradients_of_permuted_keys_are_permuted() -> None:
    """dk and dv bit by bit: a key's sum over the queries knows no other key."""
    q, k, v, *given = call()
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(2))
    dq, dk, dv = gradients(q, k, v, *given)
    dq_too, dk_too, dv_too = gradients(q, k[:, :, order], v[:, :, order], *given)
    assert torch.equal(dk_too, dk[:, :, order])
    assert torch.equal(dv_too, dv[:, :, order])
    close(dq_too, dq)


def test_the_sum_of_dv_is_that_of_dout() -> None:
    """The weights of a row add up to 1, so each query's dout reaches the keys once. Where they are
    half as large (lse is larger by log 2) half of it does."""
    q, k, v, out, lse, dout = call()
    for shift in (0.0, math.log(2.0)):
        _, _, dv = gradients(q, k, v, out, lse + shift, dout)
        want = dout.double().sum((1, 2)) * math.exp(-shift)
        close(dv.double().sum((1, 2)), want, steps=8.0)


def test_gradients_are_linear_in_dout() -> None:
    """Twice the dout is twice the gradient, bit by bit; and sums are sums."""
    q, k, v, out, lse, dout = call()
    other = dout.roll(1, 2)
    of_one, of_other = gradients(q, k, v, out, lse, dout), gradients(q, k, v, out, lse, other)
    of_twice = gradients(q, k, v, out, lse, 2 * dout)
    of_both = gradients(q, k, v, out, lse, dout + other)
    for one, another, twice, both in zip(of_one, of_other, of_twice, of_both, strict=True):
        is_normal = one.abs() > 2.0**-13
        assert torch.equal(twice[is_normal], 2 * one[is_normal])
        close(both, one.double() + another.double())


def test_keys_in_parts_have_the_gradients_of_the_whole() -> None:
    """Each part is given out and lse of all keys, which two parts merged by lse give, too."""
    q, k, v, out, lse, dout = call()
    dq, dk, dv = gradients(q, k, v, out, lse, dout)
    parts = [slice(0, 33), slice(33, 70)]
    lses = [
        attention_tiled(Problem.from_tensors(q, k[:, :, s], v[:, :, s]), q, k[:, :, s], v[:, :, s],
                        None)[1]
        for s in parts
    ]  # fmt: skip
    merged = torch.logaddexp(*lses)
    torch.testing.assert_close(merged, lse, rtol=1e-6, atol=1e-6)
    found = [gradients(q, k[:, :, s], v[:, :, s], out, lse, dout) for s in parts]
    assert torch.equal(torch.cat([x[1] for x in found], 2), dk)
    assert torch.equal(torch.cat([x[2] for x in found], 2), dv)
    close(found[0][0].double() + found[1][0].double(), dq)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradients_are_those_of_finite_differences(through: str) -> None:
    """Along random directions, in float64, of a scalar made of out and lse: no autograd."""
    q, k, v, out, lse, dout = call()
    generator = torch.Generator().manual_seed(3)
    dlse = torch.randn(lse.shape, generator=generator) if through == "lse" else None
    if dlse is not None:
        dout = torch.zeros_like(dout)
    found = gradients(q, k, v, out, lse, dout, dlse)

    def scalar(*inputs: Tensor) -> float:
        at_out, at_lse = attention_oracle(*inputs)
        total = (at_out * dout.double()).sum()
        return float(total if dlse is None else total + (at_lse * dlse.double()).sum())

    exact = [x.double() for x in (q, k, v)]
    step = 1e-4
    for number, gradient in enumerate(found):
        for _ in range(3):
            direction = torch.randn(exact[number].shape, generator=generator).double()

            def at(shift: float, number: int = number, direction: Tensor = direction) -> float:
                moved = [x + shift * direction if i == number else x for i, x in enumerate(exact)]
                return scalar(*moved)

            slope = (at(step) - at(-step)) / (2 * step)
            have = float((gradient.double() * direction).sum())
            scale = float((gradient.double().abs() * direction.abs()).sum())
            assert abs(have - slope) <= 1e-2 * scale**0.5 + 1e-3 * scale, (number, have, slope)


# --- schedules -------------------------------------------------------------------------------

ONE = BwdTile(64, 64, 2, 2, True, False, False)
# name -> (tiles of dq and of dk and dv, or of the kernel that computes all; the call)
FAMILIES: Mapping[str, tuple[Tiles | BwdTile, Any]] = {
    "plain": (SMALL, CASE),
    "causal, two consumers": (
        (BwdTile(128, 16, 2, 1), BwdTile(32, 128, 3, 3, True, True, False)),
        Case(
            num_heads_q=1, num_heads_kv=1, seqlen_q=150, seqlen_k=140, head_dim=16, head_dim_v=16,
            causal="lower_right",
        ),
    ),
    "one stage, bool mask": (
        (BwdTile(64, 48, 1, 1, False), BwdTile(48, 64, 1, 1, False, False, False)),
        Case(seqlen_q=70, seqlen_k=100, head_dim=16, head_dim_v=16, mask="bool"),
    ),
    "window, three consumers": (
        (BwdTile(192, 32, 2, 2), BwdTile(16, 192, 3, 2, True, False, False)),
        Case(seqlen_q=70, seqlen_k=200, head_dim=16, head_dim_v=16, window=(40, 20)),
    ),
    "shared keys": (
        (BwdTile(64, 32, 2, 2), BwdTile(32, 64, 2, 2)),
        Case(num_heads_q=1, num_heads_kv=1, seqlen_q=70, seqlen_k=70, head_dim=136, head_dim_v=16),
    ),
    "padded": (
        SMALL,
        PaddedCase(
            batch=3, num_heads_kv=1, seqlen_q=40, seqlen_k=90, head_dim=16, head_dim_v=16,
            lengths_k=(90, 0, 33),
        ),
    ),
    "packed": (
        SMALL,
        VarlenCase(
            lengths_q=(30, 0, 70), lengths_k=(40, 12, 70), num_heads_kv=1, head_dim=16,
            head_dim_v=16, causal="lower_right", tail=5,
        ),
    ),
    "one kernel": (ONE, Case(seqlen_q=100, seqlen_k=130, head_dim=16, head_dim_v=16)),
}  # fmt: skip


@functools.cache
def call_of(name: str) -> Any:
    return backward_call(FAMILIES[name][1])


def gradients_of(name: str, seed: int) -> tuple[Tensor, ...]:
    """Return what one schedule gives; an alarm raises."""
    tiles, case = FAMILIES[name]
    made = call_of(name)
    if isinstance(tiles, BwdTile):
        plans: Any = plan_one.make_plans(tiles, traits(made.problem) | {"folds_heads": 0})
    else:
        plans = plans_of(made.problem, tiles)
    lse, dlse = (x[0] if isinstance(case, VarlenCase) else x for x in (made.lse, made.dlse))

    def run(problem: Problem, plan: Any, tensors: dict[str, Tensor]) -> None:
        simulate_backward(problem, plan, tensors, seed=seed)

    given = made.q, made.k, made.v, made.mask, made.out, lse, made.dout, dlse
    return fused_backward(made.problem, *given, run, plans, made.lengths)


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=list(FAMILIES))
def test_no_schedule_of_160_raises_an_alarm_or_changes_a_bit(number: int) -> None:
    """A family has every eighth seed."""
    name = list(FAMILIES)[number]
    first = gradients_of(name, number)
    for seed in range(number + len(FAMILIES), 160, len(FAMILIES)):
        found = gradients_of(name, seed)
        for x, y in zip(found, first, strict=True):
            assert torch.equal(x, y), f"{name}, seed {seed}"
