"""Merge two results of attention by operations of PyTorch, and compute the gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor, Tensor | None, Tensor]


def merge_plain(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return out and lse over both sets of keys, contiguous; see `flashcore.merge`."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = _weights(lse_a, lse_b, lse)
    out = weight_a * _side(lse_a, out_a) + weight_b * _side(lse_b, out_b)
    return out.to(out_dtype).contiguous(), lse.contiguous()


def merge_backward_plain(
    dout: Tensor | None, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor,
    lse_b: Tensor,
) -> Gradients:  # fmt: skip
    """Return the gradients of out_a, lse_a, out_b and lse_b, by operations that can be recorded.

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
