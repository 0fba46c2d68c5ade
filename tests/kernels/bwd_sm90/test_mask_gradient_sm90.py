"""Test the kernel of an additive mask's gradient for Hopper, in the simulator: no alarm and the
right gradient, whatever the mask is broadcast over, the options and the schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from gradient_rule import forward, wrong_mask_gradient
from parameters import thorough_but

import flashcore
from flashcore.backends import gradients as gradients_module
from flashcore.backends.backward_sm90 import run_for_mask
from flashcore.backends.gradients import choose_backward, gradient_of_rows
from flashcore.kernels.bwd_mask_sm90.plan import MaskPlan, num_shares, select_mask_plan
from flashcore.problem import Problem
from flashcore.sim.run_bwd import simulate_backward

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CAUSAL = {"causal": True}
# name -> the mask's dimensions (1: broadcast), its dtype, that of q, heads of q and of k and v,
# lengths, head_dim and head_dim_v, options, and by how many blocks a sum is divided (0: as chosen).
# Between them: every way to read the mask and to write its gradient, both swizzles, one chunk of
# columns and several, tiles that no query sees, rows that see nothing, heads of a group.
FAMILIES: dict[str, tuple[Any, ...]] = {
    "of-heads": ("1hqk", BF16, BF16, (2, 2), (200, 152), (64, 64), {}, 1),
    "whole": ("bhqk", F32, F16, (2, 1), (70, 150), (32, 32), CAUSAL, 0),
    "of-batches": ("b1qk", F16, F16, (4, 2), (130, 131), (40, 96), CAUSAL, 1),
    "one": ("11qk", F32, BF16, (3, 1), (67, 140), (128, 64), {"window": (40, 9)}, 3),
    "keys": ("b11k", BF16, BF16, (2, 2), (150, 133), (64, 128), {"softcap": 5.0}, 1),
    "keys-in-shares": ("111k", F32, F16, (2, 1), (300, 140), (192, 256), CAUSAL, 5),
    "by-columns": ("qk", F32, F16, (2, 2), (80, 72), (48, 48), {"causal": "upper_left"}, 0),
}  # fmt: skip
BATCH = 2


def make(
    dims: str, dtype: torch.dtype, of_q: torch.dtype, heads: tuple[int, int],
    lengths: tuple[int, int], head_dims: tuple[int, int], options: dict[str, Any], seed: int = 0,
) -> tuple[Problem, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return a problem, the kernel's tensors, the mask and the gradient that arrives at lse. The
    last keys of a mask are hidden, and at rows that see nothing NaN arrives."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    rows, keys = lengths
    sizes = {"b": BATCH, "h": heads[0], "q": rows, "k": keys, "1": 1}
    q = normal(BATCH, heads[0], rows, head_dims[0]).to(of_q)
    k = normal(BATCH, heads[1], keys, head_dims[0]).to(of_q)
    v = normal(BATCH, heads[1], keys, head_dims[1]).to(of_q)
    mask = normal(*[sizes[d] for d in dims]).to(dtype)
    if dims == "qk":
        mask = mask.t().contiguous().t()
    mask[..., 2::7] = -math.inf
    if mask.shape[-2:-1] == (rows,):
        mask[..., rows // 2, :] = -math.inf
    problem, out, lse = forward(q, k, v, mask, options)
    empty = lse == -math.inf
    dout = normal(*out.shape).to(of_q).masked_fill(empty[..., None], math.nan)
    dlse = normal(*lse.shape).masked_fill(empty, math.nan)
    delta = ((dout.float() * out.float()).sum(-1) - dlse).masked_fill(empty, 0.0)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout, "delta": delta}
    return problem, tensors | {"mask": mask}, mask, dlse


def computed(problem, tensors, mask, shares: int, seed: int) -> torch.Tensor:
    def run(problem: Problem, plan: MaskPlan, tensors: dict[str, torch.Tensor]) -> None:
        simulate_backward(problem, plan, tensors, seed=seed)

    shape = (*[1] * (4 - mask.dim()), *mask.shape)
    plan = select_mask_plan(problem, shape)
    plan = dataclasses.replace(plan, num_shares=shares or plan.num_shares)
    found = torch.empty(shape, dtype=mask.dtype)
    run_for_mask(problem, tensors, found, run, plan)
    return found.view(mask.shape)


@pytest.mark.parametrize("name", thorough_but(("whole", "one", "keys", "by-columns"), FAMILIES))
def test_the_kernel_is_healthy_and_right(name: str) -> None:
    *case, options, shares = FAMILIES[name]
    problem, tensors, mask, dlse = make(*case, options)
    found = computed(problem, tensors, mask, shares, seed=0)
    q, k, v, out, dout = (tensors[x] for x in ("q", "k", "v", "out", "dout"))
    empty = tensors["lse"] == -math.inf
    arriving = dout.masked_fill(empty[..., None], 0.0), dlse.masked_fill(empty, 0.0)
    assert not wrong_mask_gradient(found, q, k, v, mask, *arriving, options, out)
    # The order of the sums does not depend on the schedule.
    assert torch.equal(found, computed(problem, tensors, mask, shares, seed=1))


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_no_schedule_makes_a_difference(name: str) -> None:
    *case, options, shares = FAMILIES[name]
    problem, tensors, mask, _ = make(*case, options, seed=1)
    first, *others = (computed(problem, tensors, mask, shares, seed) for seed in range(8))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 130), (130, 1), (129, 257), (64, 65)])
def test_lengths_that_leave_tiles_nearly_empty(lengths: tuple[int, int]) -> None:
    """With one key or one query a mask that has a row and a column for each is a broadcast one."""
    case = "1hqk", F16, F16, (1, 1), lengths, (32, 32)
    problem, tensors, mask, dlse = make(*case, {})
    mask.nan_to_num_(neginf=0.0)
    problem, out, lse = forward(tensors["q"], tensors["k"], tensors["v"], mask, {})
    dout = torch.ones_like(out)
    delta = (dout.float() * out.float()).sum(-1) - dlse.nan_to_num()
    tensors |= {"out": out, "lse": lse, "dout": dout, "delta": delta}
    found = computed(problem, tensors, mask, 0, 0)
    inputs = tensors["q"], tensors["k"], tensors["v"], mask, dout, dlse.nan_to_num()
    assert not wrong_mask_gradient(found, *inputs, {}, out)


def leaves_of(*mask_shape: int, head_dim: int = 64, length: int = 70) -> list[torch.Tensor]:
    shapes = [(2, 2, length, head_dim)] * 3 + [mask_shape]
    return [torch.randn(shape, dtype=F16, requires_grad=True) for shape in shapes]


def test_a_call_in_the_simulator_has_it_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three launches, of tensors that TMA cannot read as they are; the mask's strides are those
    that compilers are promised."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    ran: list[str] = []

    def run(problem: Problem, plan: Any, tensors: dict[str, torch.Tensor]) -> None:
        ran.append(plan.kernel)
        simulate_backward(problem, plan, tensors)

    monkeypatch.setattr(gradients_module, "run_in_simulator", run)
    leaves = leaves_of(70, 70, head_dim=20)
    leaves[3] = leaves[3].detach().t().requires_grad_()
    out = flashcore.attention(*leaves[:3], mask=leaves[3], backend="sim")
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    assert ran == ["attn_bwd_dq_sm90", "attn_bwd_dkdv_sm90", "attn_bwd_dmask_sm90"]
    assert found[3].stride() == leaves[3].stride()
    assert not wrong_mask_gradient(found[3], *leaves, dout, None, {}, out)


@pytest.mark.parametrize("shape", thorough_but([(2, 1, 70, 1)], [(2, 1, 70, 1), (70, 1), (1,), ()]))
def test_a_mask_of_rows_needs_no_scores(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves no weight from key to key: without a gradient of lse, or a sink, its own is 0."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    leaves = leaves_of(*shape)
    for sinks in (None, torch.randn(2)):
        results = flashcore.attention(
            *leaves[:3], mask=leaves[3], sinks=sinks, return_lse=True, backend="sim"
        )
        arriving = [torch.randn_like(x) for x in results]
        found = torch.autograd.grad(results, leaves, arriving)[3]
        options = {} if sinks is None else {"sinks": sinks}
        inputs = *leaves, *arriving, options, results[0].detach()
        assert not wrong_mask_gradient(found, *inputs)
    assert not gradient_of_rows(leaves[3], *results, arriving[0], None).any()


def test_explain_says_that_the_gradient_of_a_mask_is_fused() -> None:
    q, k, v, mask = leaves_of(1, 2, 70, 70)
    problem = dataclasses.replace(
        Problem.from_tensors(q, k, v, mask=mask, return_lse=True), device="cuda", arch=90
    )
    choice = choose_backward(problem, mask_grad_elements=mask.numel())
    assert choice.code == "sm90"
    assert "another for the mask's gradient" in choice.reason
    keys = dataclasses.replace(problem, varlen="keys")
    assert choose_backward(keys, mask_grad_elements=mask.numel()).code != "sm90"


def test_few_tiles_are_shared_by_blocks() -> None:
    """A mask of one tile for all heads and batches keeps more than one block busy; a large one has
    no shares, whose memory would grow with it."""

    def shares(batch: int, heads: int, length: int, *shape: int) -> int:
        q = torch.empty(batch, heads, length, 64, dtype=F16, device="meta")
        problem = dataclasses.replace(
            Problem.from_tensors(*[q.new_empty(1, 1, 8, 64, device="cpu")] * 3,
                                 mask=torch.empty(1, 1, 8, 8)),
            batch=batch, num_heads_q=heads, num_heads_kv=heads, seqlen_q=length, seqlen_k=length,
        )  # fmt: skip
        plan = select_mask_plan(problem, (*shape, length, length))
        memory = math.prod(plan.shares_shape(problem)) * 4
        assert plan.num_shares == 1 or memory <= 36 << 20
        assert plan.num_shares == num_shares(problem, plan)
        assert plan.num_shares <= plan.num_steps(problem)
        return plan.num_shares

    assert shares(8, 16, 128, 1, 1) == 119  # the fewest that keep 9 of 10 SMs busy
    assert shares(8, 16, 1024, 1, 1) > 1
    assert shares(8, 16, 8192, 1, 1) == 1
    assert shares(8, 16, 8192, 8, 16) == 1
