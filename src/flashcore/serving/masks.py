"""Make masks over a cache out of what is known of heads."""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_over_cache(slopes: Tensor, seqlen_q: int, lengths: Tensor, capacity: int) -> Tensor:
    """Return the bias -slope * abs(i + length - seqlen_q - j) of query i and key j.

    Args:
        slopes: [num_heads_q] or [batch, num_heads_q].
        seqlen_q: queries.
        lengths: int32, [batch]: keys of each sequence.
        capacity: keys that a sequence has room for.

    Returns:
        [batch, num_heads_q, seqlen_q, capacity], float32.
    """
    i = torch.arange(seqlen_q, device=lengths.device)
    j = torch.arange(capacity, device=lengths.device)
    behind = (lengths.long()[:, None] + i - seqlen_q)[..., None] - j
    return -slopes.float().reshape(-1, slopes.shape[-1], 1, 1) * behind.abs()[:, None]
