"""The fused backward takes at most 8 bytes a row and head beside dq, dk and dv, and the workspace
that `set_gradient_workspace` allows: no copies of heads that share keys, nothing that grows with
the square of seqlen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashcore
from flashcore.backends.backward_sm90 import fused_backward
from flashcore.backends.packed import packed_problem
from flashcore.base.gradient_workspace import DEFAULT_BYTES
from flashcore.checks.cases import make_inputs
from flashcore.kernels.bwd_sm90.plan import obstacle_anywhere
from flashcore.ops.padded import padded_problem
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.problem.options import Inputs, Options

BYTES_OF_A_ROW = 8
# Counters of tiles, and what an allocation is rounded up to.
A_LITTLE = 16384

# name -> a call; lengths are long enough for anything quadratic to show.
CALLS: dict[str, Case] = {
    "D64": Case(num_heads_q=4, num_heads_kv=4, seqlen_q=2048, seqlen_k=2048),
    "D128-causal-rows-first": Case(
        batch=2, seqlen_q=1500, seqlen_k=1500, head_dim=128, head_dim_v=128, layout="bshd",
        causal="lower_right", dtype="bfloat16",
    ),
    "D256": Case(seqlen_q=1024, seqlen_k=1024, head_dim=256, head_dim_v=256, dtype="bfloat16"),
    "grouped-heads": Case(
        num_heads_q=8, num_heads_kv=1, seqlen_q=1024, seqlen_k=1024, head_dim=192, head_dim_v=128
    ),
    "few-keys": Case(num_heads_q=4, num_heads_kv=2, seqlen_q=4000, seqlen_k=100),
    "few-queries": Case(num_heads_q=4, num_heads_kv=2, seqlen_q=100, seqlen_k=4000),
    "window-softcap": Case(seqlen_q=2048, seqlen_k=2048, window=(100, 0), softcap=20.0),
    "bool-mask": Case(seqlen_q=1024, seqlen_k=1024, mask="bool", seed=1),
    "additive-mask": Case(seqlen_q=1024, seqlen_k=1024, mask="additive", dtype="bfloat16", seed=1),
}  # fmt: skip


def allowed(q: Tensor, k: Tensor, v: Tensor, rows_and_heads: int) -> int:
    gradients = sum(x.numel() * x.element_size() for x in (q, k, v))
    return gradients + BYTES_OF_A_ROW * rows_and_heads + A_LITTLE


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Return bytes by address of what the tensors lie in."""
    found = (x.untyped_storage() for x in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_kernels_are_given_no_more(name: str, padded: bool, with_dlse: bool) -> None:
    """Nothing is launched: what there is room for is looked at."""
    case = CALLS[name]
    x = make_inputs(case)
    out = x.q.new_zeros(*x.q.shape[:3], case.head_dim_v)
    lse = torch.zeros(x.q.shape[:3])
    dout, dlse = torch.zeros_like(out), torch.zeros_like(lse) if with_dlse else None
    seqlens_k = None
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options())
    if padded:
        seqlens_k = torch.full((case.batch,), case.seqlen_k // 2, dtype=torch.int32)
        asked = case.options()
        options = Options.checked(asked["causal"], case.window, case.softcap, case.scale)
        problem = padded_problem(Inputs(x.q, x.k, x.v, x.mask, seqlens_k), options)
    inputs = [x.q, x.k, x.v, out, lse, dout]
    inputs += [tensor for tensor in (x.mask, dlse, seqlens_k) if tensor is not None]
    made: dict[int, int] = {}

    def run(problem: Problem, plan: Any, tensors: dict[str, Tensor]) -> None:
        made.update(storages(list(tensors.values())))

    given = x.q, x.k, x.v, x.mask, out, lse, dout, dlse
    lengths = {} if seqlens_k is None else {"seqlens_k": seqlens_k}
    fused_backward(problem, *given, run, lengths=lengths)
    own = storages(inputs)
    extra = sum(size for address, size in made.items() if address not in own)
    assert extra <= allowed(x.q, x.k, x.v, lse.numel())


def peak_of(call: Callable[[], object]) -> int:
    """Return the bytes that a call asks for beside what is there, at most at a time."""
    extra = 0
    for _ in range(2):  # the second time everything that stays is there
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = call()
        torch.cuda.synchronize()
        # As asked for: what is allocated depends on what was left of blocks before.
        extra = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        del result
    return extra


def only_on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_autograd_takes_no_more(name: str, padded: bool) -> None:
    only_on_hopper()
    case = CALLS[name]
    x = make_inputs(case, "cuda")
    leaves = [tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v)]
    seqlens_k = None
    if padded:
        seqlens_k = torch.full((case.batch,), case.seqlen_k // 2, dtype=torch.int32, device="cuda")
    q, k, v = leaves
    out = flashcore.attention(q, k, v, mask=x.mask, seqlens_k=seqlens_k, **case.options())
    dout = torch.randn_like(out)
    extra = peak_of(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    assert extra <= allowed(q, k, v, q.shape[:3].numel())


@pytest.mark.gpu
@pytest.mark.parametrize("heads_kv", [8, 2])
def test_autograd_of_packed_sequences_takes_no_more(heads_kv: int) -> None:
    only_on_hopper()
    lengths = torch.tensor([0, 1000, 1003, 1003, 3500], dtype=torch.int32, device="cuda")
    q, k, v = (
        torch.randn(3500, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, heads_kv, heads_kv)
    )
    reason = obstacle_anywhere(packed_problem(q, k, v, lengths, lengths, 2497, 2497, causal=True))
    if reason is not None:
        pytest.skip(reason)
    out = flashcore.attention_varlen(q, k, v, lengths, lengths, 2497, 2497, causal=True)
    dout = torch.randn_like(out)
    extra = peak_of(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    assert extra <= allowed(q, k, v, 8 * 3500)


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [0, 64 << 20, DEFAULT_BYTES])
def test_a_hundred_thousand_tokens_take_memory_linear_in_them(workspace: int) -> None:
    """A workspace comes on top where one kernel computes all: for two of the heads at a time, or
    all three."""
    only_on_hopper()
    q, k, v = (
        torch.randn(1, 3, 131072, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    out = flashcore.attention(q, k, v, causal=True)
    dout = torch.randn_like(out)
    flashcore.set_gradient_workspace(workspace)
    try:
        extra = peak_of(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    finally:
        flashcore.set_gradient_workspace()
    without = allowed(q, k, v, 3 * 131072)
    assert extra <= without + workspace
    assert (extra > without) == (workspace > 0)
