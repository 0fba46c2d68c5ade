"""Test the backward kernels for Hopper, in the simulator: no alarm and right gradients, whatever
the shape, the options and the schedule."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from typing import Any

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from parameters import thorough_but
from test_sim_healthy import draw_case

import flashcore
from flashcore.backends import gradients
from flashcore.backends.backward_sm90 import fused_backward
from flashcore.backends.gradients import choose_backward
from flashcore.checks.cases import make_inputs
from flashcore.errors import BackendUnavailableError, FallbackWarning
from flashcore.kernels.bwd_sm90.plan import (
    DKDV_KERNEL,
    DQ_KERNEL,
    BwdPlans,
    make_plan,
    obstacle,
    select_plans,
)
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.kernels.fwd_sm90.tiles import mask_traits
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim.run_bwd import simulate_backward

SEEDS_OF_A_FAMILY = 6

# name -> (tiles of dq and of dk and dv, None for the selected ones; what is fixed). Between them:
# one to three consumers, two that share 64 keys, every schedule of the products, every mask kind,
# both windows, softcap, empty rows, both swizzles, column chunks of which a part is padding.
SMALL = BwdTile(64, 32, 3, 2), BwdTile(32, 64, 3, 2)
SIMPLE = BwdTile(64, 48, 1, 1, False), BwdTile(48, 64, 1, 1, False, False, False)
WIDE = BwdTile(192, 32, 2, 2), BwdTile(16, 192, 3, 2, True, False, False)
TWO = BwdTile(128, 16, 2, 1), BwdTile(32, 128, 3, 3, True, True, False)
FAMILIES: dict[str, tuple[tuple[BwdTile, BwdTile] | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "causal": (TWO, {"dtype": "bfloat16", "causal": "lower_right", "layout": "bshd"}),
    "one-stage-bool-mask": (SIMPLE, {"mask": "bool", "causal": "upper_left"}),
    "window-softcap": (WIDE, {"window": (40, 20), "softcap": 5.0}),
    "padded-dims-additive-mask": (
        SMALL,
        {"head_dim": 40, "head_dim_v": 48, "mask": "additive", "softcap": 3.0},
    ),
    "narrow-chunks": (TWO, {"head_dim": 96, "head_dim_v": 80, "causal": "lower_right"}),
    "shared-keys": (
        (BwdTile(64, 32, 2, 2), BwdTile(32, 64, 2, 2)),
        {"head_dim": 144, "head_dim_v": 72, "dtype": "bfloat16", "window": (50, 9)},
    ),
    "shared-keys-softcap": (
        (BwdTile(64, 16, 2, 1, False), BwdTile(16, 64, 3, 2)),
        {"head_dim": 40, "head_dim_v": 192, "causal": "upper_left", "softcap": 2.0},
    ),
}
# What stays in the fast run; the others take up to two seconds each.
CHEAP = "causal", "padded-dims-additive-mask"


def plans_of(problem, tiles: tuple[BwdTile, BwdTile] | None) -> BwdPlans:
    if tiles is None:
        return select_plans(problem)
    fields = traits(problem) | mask_traits(problem) | {"folds_heads": 0}
    kernels = (DQ_KERNEL, DKDV_KERNEL)
    return BwdPlans(*(make_plan(k, t, fields) for k, t in zip(kernels, tiles, strict=True)))


def check(
    case: Case, tiles: tuple[BwdTile, BwdTile] | None, seed: int = 0, dout_seed: int | None = None
) -> None:
    """Check that there is neither an alarm nor a wrong result. Gradients that arrive at rows
    that see nothing are NaN."""
    x = make_inputs(case)
    generator = torch.Generator().manual_seed(case.seed if dout_seed is None else dout_seed)
    problem, out, lse = forward(x.q, x.k, x.v, x.mask, case.options())
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=generator) if seed % 2 else None
    empty = lse == -math.inf
    dout = dout.masked_fill(empty[..., None], math.nan)
    dlse = None if dlse is None else dlse.masked_fill(empty, math.nan)
    inputs = x.q, x.k, x.v, x.mask

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors, seed=seed)

    plans = plans_of(problem, tiles)
    found = fused_backward(problem, *inputs, out, lse, dout, dlse, run, plans)
    wrong = wrong_gradients(found, *inputs, dout, dlse, case.options(), out)
    assert not wrong, f"{case.describe()}: {wrong}\n{dataclasses.asdict(case)}"


@pytest.mark.parametrize("name", thorough_but(CHEAP, FAMILIES))
def test_the_kernels_are_healthy_and_right(name: str) -> None:
    tiles, fixed = FAMILIES[name]
    for seed in range(SEEDS_OF_A_FAMILY):
        check(draw_case(fixed, seed), tiles, seed)


@pytest.mark.parametrize("head_dim", thorough_but((72,), (8, 64, 72, 104, 128, 192, 256)))
def test_every_head_dim_with_the_tiles_that_are_selected(head_dim: int) -> None:
    """72 and 104 leave the last of 16 columns empty, where others had dq wrong."""
    case = Case(
        num_heads_q=4,
        num_heads_kv=2,
        seqlen_q=70,
        seqlen_k=130,
        head_dim=head_dim,
        head_dim_v=head_dim,
        dtype="bfloat16",
        causal="lower_right",
    )
    check(case, None)


LENGTHS = (1, 1), (1, 300), (300, 1), (193, 64), (64, 193)


@pytest.mark.parametrize("lengths", thorough_but([(1, 1), (193, 64)], LENGTHS))
def test_lengths_that_leave_tiles_nearly_empty(lengths: tuple[int, int]) -> None:
    """Keys behind the last would count exp(-lse), which is infinite where lse is below -89."""
    for causal in ("none", "lower_right", "upper_left"):  # with keys that no query sees
        case = Case(seqlen_q=lengths[0], seqlen_k=lengths[1], causal=causal, spread=30.0)
        check(case, None, seed=1)


@pytest.mark.thorough
def test_two_queries_with_nearly_all_weight_on_one_key() -> None:
    """There plain attention errs 4 to 11 times less with some of these gradients: it has delta from
    the weights, a fused backward pass from out, which is rounded. The rule knows that."""
    fixed = FAMILIES["one-stage-bool-mask"][1]
    for seed, dout_seeds in ((29, (6, 19)), (38, (9, 52))):
        for dout_seed in dout_seeds:
            check(draw_case(fixed, seed), None, dout_seed=dout_seed)


def test_rows_whose_scores_are_far_below_zero() -> None:
    """lse -200: exp(0 - lse) overflows for keys that do not exist, and 0 * inf would be NaN."""
    case = Case(seqlen_q=192, seqlen_k=70, head_dim=32, head_dim_v=32)
    x = make_inputs(case)
    x.q[:, :, :, 0], x.k[:, :, :, 0] = 60.0, -20.0
    problem, out, lse = forward(x.q, x.k, x.v, None, {})
    assert lse.max() < -150.0
    dout = torch.ones_like(out)

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors)

    found = fused_backward(problem, x.q, x.k, x.v, None, out, lse, dout, None, run)
    assert not wrong_gradients(found, x.q, x.k, x.v, None, dout, None, {})


@pytest.mark.parametrize("missing", ["dout", "dlse"])
def test_a_gradient_may_arrive_through_out_or_lse_alone(missing: str) -> None:
    x = make_inputs(Case(seqlen_q=40, seqlen_k=50))
    problem, out, lse = forward(x.q, x.k, x.v, None, {})
    dout = None if missing == "dout" else torch.randn_like(out)
    dlse = None if missing == "dlse" else torch.randn_like(lse)

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors)

    found = fused_backward(problem, x.q, x.k, x.v, None, out, lse, dout, dlse, run)
    zero = torch.zeros_like(out)
    inputs = x.q, x.k, x.v, None, zero if dout is None else dout, dlse
    assert not wrong_gradients(found, *inputs, {})


def test_gradients_of_strided_tensors_and_of_an_expanded_gradient() -> None:
    """q, k, v cut out of one projection; dout of out.sum(), all of it one number in memory."""
    packed = torch.randn(2, 70, 3, 2, 64, dtype=torch.float16)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    problem, out, lse = forward(q, k, v, None, {"causal": True})
    dout = torch.ones((), dtype=out.dtype).expand(out.shape)

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors)

    found = fused_backward(problem, q, k, v, None, out, lse, dout, None, run)
    assert not wrong_gradients(found, q, k, v, None, dout, None, {"causal": True})
    for gradient, x in zip(found, (q, k, v), strict=True):
        assert gradient.stride() == torch.empty_like(x).stride()


def test_tensors_that_tma_cannot_read_are_copied() -> None:
    """head_dim 20, rows at odd multiples of 8 bytes, k and v one head that all heads share."""
    q = torch.randn(1, 4, 50, 24, dtype=torch.float16)[..., 2:22]
    k = torch.randn(1, 1, 70, 20, dtype=torch.float16).expand(1, 4, 70, 20)
    v = torch.randn(1, 1, 70, 12, dtype=torch.float16).expand(1, 4, 70, 12)
    options = {"causal": True, "scale": 0.4}
    problem, out, lse = forward(q, k, v, None, options)
    dout = torch.randn(12, 50, 4, 1, dtype=out.dtype).permute(3, 2, 1, 0)
    check_copies(problem, (q, k, v), out, lse, dout, options)


def test_tensors_that_lie_channels_last_are_copied() -> None:
    """Heads are the last dimension in memory, which a copy must not keep, and rows need padding."""
    q, k, v, dout = (torch.randn(1, 50, 20, 8).half().permute(0, 3, 1, 2) for _ in range(4))
    problem, out, lse = forward(q, k, v, None, {})
    check_copies(problem, (q, k, v), out, lse, dout, {})


@pytest.mark.parametrize("head_dim", [8, 232])
def test_batches_of_one_row(head_dim: int) -> None:
    """Batches are as far apart as rows, or as the stride that a descriptor has of a single row."""
    q, k, v, dout = (torch.randn(2, 1, 1, head_dim, dtype=torch.float16) for _ in range(4))
    problem, out, lse = forward(q, k, v, None, {})
    check_copies(problem, (q, k, v), out, lse, dout, {})


def test_one_query_of_each_batch_in_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of out are stored by a map, from all warpgroups."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    q, k, v = (torch.randn(2, 1, 1, 232, dtype=torch.float16) for _ in range(3))
    assert torch.equal(flashcore.attention(q, k, v, backend="sim"), v)


def check_copies(
    problem: Problem,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    options: dict[str, Any],
) -> None:
    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors)

    found = fused_backward(problem, *inputs, None, out, lse, dout, None, run)
    assert not wrong_gradients(found, *inputs, None, dout, None, options)
    for gradient, x in zip(found, inputs, strict=True):
        assert gradient.shape == x.shape
        assert gradient.stride() == torch.empty_like(x).stride()


def test_a_call_in_the_simulator_has_its_gradient_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly, and through the operators of torch; explain says so."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    launched: list[str] = []

    def record(problem, plan, tensors, **options) -> None:
        launched.append(plan.kernel)
        simulate_backward(problem, plan, tensors, **options)

    monkeypatch.setattr("flashcore.sim.run_bwd.simulate_backward", record)
    x = make_inputs(Case(seqlen_q=40, seqlen_k=50))
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    dout = torch.randn(1, 2, 40, 64, dtype=torch.float16)

    def function(*tensors):
        return flashcore.attention(*tensors, causal=True, backend="sim")

    _, vjp = torch.func.vjp(function, *(t.detach() for t in leaves))
    through_operators = vjp(dout)
    eager = torch.autograd.grad(function(*leaves), leaves, dout)
    assert launched == [DQ_KERNEL, DKDV_KERNEL] * 2
    for found in (eager, through_operators):
        options = {"causal": True}
        assert not wrong_gradients(found, x.q, x.k, x.v, None, dout, None, options)
    said = flashcore.explain(*leaves, causal=True, backend="sim", file=io.StringIO())
    assert said.gradient.code == "sim"
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "80")
    said = flashcore.explain(*leaves, causal=True, backend="sim", file=io.StringIO())
    assert said.gradient.code == "tiled"


def test_what_has_no_fused_backward_says_why() -> None:
    """The reasons by which gradients go to torch's operators or to tiles."""
    q, k, v = (torch.randn(1, 2, 16, 64, dtype=torch.float16) for _ in range(3))
    problem = forward(q, k, v, None, {})[0]
    hopper = dataclasses.replace(problem, device="cuda", arch=90)
    assert obstacle(hopper) is None
    assert choose_backward(hopper).code == "sm90"
    assert choose_backward(hopper, backend="torch").code == "flash"
    for changed, word in (
        ({"arch": 80}, "Hopper"),
        ({"device": "cpu", "arch": 0}, "Hopper"),
        ({"dtype": "float32"}, "float32"),
        ({"head_dim_v": 264}, "256"),
        ({"varlen": "packed", "total_q": 2**29}, "32 bits"),
    ):
        assert word in (obstacle(dataclasses.replace(hopper, **changed)) or "")
    assert obstacle(hopper, needs_mask_grad=True) is None
    padded = dataclasses.replace(hopper, varlen="keys")
    assert "mask" in (obstacle(padded, needs_mask_grad=True) or "")


def test_without_a_compiler_torch_computes_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bundle may hold the kernels of the forward alone."""
    q, k, v = (torch.randn(1, 2, 16, 64, dtype=torch.float16) for _ in range(3))
    problem, out, lse = forward(q, k, v, None, {})
    hopper = dataclasses.replace(problem, device="cuda", arch=90)

    def unavailable(*_) -> None:
        raise BackendUnavailableError("no NVRTC")

    monkeypatch.setattr(gradients, "fused_backward", unavailable)
    monkeypatch.setattr(gradients.torch_backward, "flash_gradients", lambda *_: (q, k, v, None))
    call = hopper, q, k, v, None, out, lse, torch.ones_like(out), None, False
    with pytest.warns(FallbackWarning, match="no NVRTC"):
        assert torch.equal(gradients.attention_gradients(*call)[0], q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients.attention_gradients(*call)
