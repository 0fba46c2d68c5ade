"""Merge two results of attention, and compute the gradients: by one kernel each on a GPU
(kernels/merge), elsewhere, and in float64, by operations of PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcore.backends.obstacles import BFLOAT16_MIN_ARCH, WMMA_MIN_ARCH
from flashcore.errors import BackendUnavailableError, notice_once
from flashcore.kernels.merge.params import (
    ROWS_MAX,
    MergeBackwardTensors,
    MergeTensors,
    as_rows,
    new_like,
)
from flashcore.launch.merge_call import launch_merge
from flashcore.problem.problem import arch_of_device

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Gradients = tuple[Tensor | None, Tensor, Tensor | None, Tensor]


def merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return out and lse over both sets of keys, contiguous; see `flashcore.merge`."""
    if out_a.is_cuda and _has_kernel(out_a, out_b, lse_a, out_dtype):
        sides = as_rows(out_a, True), as_rows(out_b, True), as_rows(lse_a, False)
        out = torch.empty(out_a.shape, dtype=out_dtype, device=out_a.device)
        lse = new_like(lse_a)
        written = as_rows(out, True), as_rows(lse, False)
        if _launched(MergeTensors(*sides, as_rows(lse_b, False), *written), out_dtype):
            return out, lse
    return merge_by_torch(out_a, lse_a, out_b, lse_b, out_dtype)


def merge_backward(
    dout: Tensor | None, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor,
    lse_b: Tensor, out_dtype: torch.dtype,
) -> Gradients:  # fmt: skip
    """Return the gradients of out_a, lse_a, out_b and lse_b.

    Args:
        dout: what arrives at out, or None for zero.
        dlse: what arrives at lse, or None for zero.
        out_a: as the forward was given it, like those that follow.
        lse_a: of out_a.
        out_b: over the other keys.
        lse_b: of out_b.
        out_dtype: of out.
    """
    if out_a.is_cuda and _has_kernel(out_a, out_b, lse_a, out_dtype):
        dout_rows = None if dout is None else as_rows(dout, True)
        dlse_rows = None if dlse is None else as_rows(dlse, False)
        new = [new_like(x) for x in (out_a, out_b, lse_a, lse_b)]
        dout_a, dout_b, dlse_a, dlse_b = new
        tensors = MergeBackwardTensors(
            as_rows(out_a, True), as_rows(out_b, True), as_rows(lse_a, False),
            as_rows(lse_b, False), dout_rows, dlse_rows, as_rows(dout_a, True),
            as_rows(dout_b, True), as_rows(dlse_a, False), as_rows(dlse_b, False),
        )  # fmt: skip
        if _launched(tensors, out_dtype):
            return dout_a, dlse_a, dout_b, dlse_b
    return merge_backward_by_torch(dout, dlse, out_a, lse_a, out_b, lse_b)


def _has_kernel(out_a: Tensor, out_b: Tensor, lse: Tensor, out_dtype: torch.dtype) -> bool:
    """Return whether the kernels take such tensors on their GPU."""
    dtypes = out_a.dtype, out_b.dtype, out_dtype
    lowest = BFLOAT16_MIN_ARCH if torch.bfloat16 in dtypes else WMMA_MIN_ARCH
    return (
        all(dtype in _KERNEL_DTYPES for dtype in dtypes)
        and lse.dtype == torch.float32
        and out_a.numel() > 0
        and lse.numel() < ROWS_MAX
        and arch_of_device(out_a.device.index) >= lowest
    )


def _launched(tensors: MergeTensors | MergeBackwardTensors, out_dtype: torch.dtype) -> bool:
    """Launch the kernel; return False where it cannot be compiled, and say so once."""
    try:
        launch_merge(tensors, out_dtype)
    except BackendUnavailableError as error:
        notice_once("merge", f"PyTorch merges results, which takes more launches: {error}")
        return False
    return True


def merge_by_torch(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what `merge` returns, by operations of PyTorch."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = _weights(lse_a, lse_b, lse)
    out = weight_a * _side(lse_a, out_a) + weight_b * _side(lse_b, out_b)
    return out.to(out_dtype).contiguous(), lse.contiguous()


def merge_backward_by_torch(
    dout: Tensor | None, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor,
    lse_b: Tensor,
) -> Gradients:  # fmt: skip
    """Return what `merge_backward` returns, by operations of PyTorch, which can be recorded.

    A share's derivative by its own lse is share * (1 - share): with the row sums of dout * out, the
    gradient of lse_a is share_a * (sum_a - sum + dlse). A row that is -inf on both sides gets 0
    whatever arrives there.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    empty = lse == -math.inf
    shares = _weights(lse_a, lse_b, lse)
    sides = _side(lse_a, out_a), _side(lse_b, out_b)
    of_lse = torch.zeros_like(lse) if dlse is None else dlse.masked_fill(empty, 0.0)
    if dout is None:
        douts: list[Tensor | None] = [None, None]
        sums = [torch.zeros_like(lse)] * 2
    else:
        dout = _side(lse, dout)
        douts = [
            (share * dout).to(x.dtype) for share, x in zip(shares, (out_a, out_b), strict=True)
        ]
        sums = [(dout * side).sum(-1) for side in sides]
    share_a, share_b = (share.squeeze(-1) for share in shares)
    total = share_a * sums[0] + share_b * sums[1]
    return (
        douts[0], share_a * (sums[0] - total + of_lse),
        douts[1], share_b * (sums[1] - total + of_lse),
    )  # fmt: skip


def _weights(lse_a: Tensor, lse_b: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of each side in a row, [..., 1]; 0 for one that attends to nothing."""
    base = lse.masked_fill(lse == -math.inf, 0.0)  # -inf - -inf is NaN
    return torch.exp(lse_a - base).unsqueeze(-1), torch.exp(lse_b - base).unsqueeze(-1)


def _side(lse: Tensor, x: Tensor) -> Tensor:
    """Return out or a gradient in the dtype of lse, 0 where the side attends to nothing: whatever
    stands there, NaN too, has no part in the result."""
    return x.to(lse.dtype).masked_fill((lse == -math.inf).unsqueeze(-1), 0.0)
