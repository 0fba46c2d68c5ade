"""Say which token each row of a tensor is: of which sequence, and which one of it.

Everything here is arithmetic on the device: the host never waits for a length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Hold the rows of a padded [batch, num_heads, seqlen, head_dim] tensor, or of a packed [total,
    num_heads, head_dim] one.

    Args:
        sequence: int64, [batch, 1] or [total]: the sequence of each row; within range, whatever the
            lengths hold.
        token: int64, [1, seqlen] or [total]: which token of it, from 0.
        is_any: bool, [total]: False for packed rows of no sequence. None: all are of one.
    """

    sequence: Tensor
    token: Tensor
    is_any: Tensor | None

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None) -> Rows:
        """Describe the rows of a tensor.

        Args:
            x: [batch, num_heads, seqlen, head_dim], or [total, num_heads, head_dim], at least one
                row and one sequence.
            cu_seqlens: int32, [batch + 1], where x is packed.
        """
        if cu_seqlens is None:
            sequence = torch.arange(x.shape[0], device=x.device)[:, None]
            token = torch.arange(x.shape[2], device=x.device)[None]
            return cls(sequence, token, None)
        ends = cu_seqlens.long().clamp(0, x.shape[0])
        row = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(ends[1:], row, right=True)
        is_any = (sequence < ends.shape[0] - 1) & (row >= ends[0])
        sequence = sequence.clamp(max=ends.shape[0] - 2)
        return cls(sequence, row - ends[sequence], is_any)


def lengths_before(seqlens_k: Tensor, capacity: int) -> Tensor:
    """Return how many tokens each sequence of a cache has, as attention counts them: int32, from 0
    to what it has room for."""
    return seqlens_k.clamp(0, capacity)


def lengths_of_keys(seqlens_k: Tensor, capacity: int, leftpad: Tensor | None) -> Tensor:
    """Return how many keys each sequence has: int32, without those of padding on the left."""
    lengths = lengths_before(seqlens_k, capacity)
    if leftpad is None:
        return lengths
    return (lengths - leftpad.clamp(0, capacity)).clamp(min=0)


def lengths_after(seqlens_k: Tensor, capacity: int, new: Tensor | int) -> Tensor:
    """Return how many tokens each sequence has once the new ones are in the cache, int32."""
    return (lengths_before(seqlens_k, capacity) + new).clamp(max=capacity)


def number_of(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | int:
    """Return how many tokens each sequence has in a tensor: int32, [batch], or an int for all.

    Args:
        x: [batch, num_heads, seqlen, head_dim], or [total, num_heads, head_dim].
        cu_seqlens: int32, [batch + 1], where x is packed.
    """
    if cu_seqlens is None:
        return x.shape[2]
    return cu_seqlens.clamp(0, x.shape[0]).diff().clamp(min=0)
