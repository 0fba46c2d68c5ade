"""Make masks over a cache out of what is known of a few queries or of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.serving.rows import lengths_before


def tree_over_cache(
    tree: Tensor, mask: Tensor | None, q: Tensor, lengths: Tensor, capacity: int
) -> Tensor:
    """Return a mask over a cache: the last seqlen_q keys by a tree, those before are visible.

    Args:
        tree: boolean, broadcastable to [batch, num_heads_q, seqlen_q, seqlen_q]; checked.
        mask: another, over the cache, that holds besides; or None.
        q: [batch, num_heads_q, seqlen_q, head_dim].
        lengths: int32, [batch]: keys of each sequence, those of the queries among them.
        capacity: keys that a sequence has room for.

    Returns:
        [batch, 1 or num_heads_q, seqlen_q, capacity]: boolean, or as mask.
    """
    seqlen_q = q.shape[2]
    tree = tree[(None,) * (4 - tree.dim())]
    tree = tree.expand(q.shape[0], tree.shape[1], seqlen_q, seqlen_q)
    # Key j is the tree's column j - (length - seqlen_q).
    last = lengths_before(lengths, capacity).long() - seqlen_q
    column = torch.arange(capacity, device=q.device) - last[:, None]
    if seqlen_q == 0:
        visible = tree.new_ones((*tree.shape[:3], capacity))
    else:
        index = column.clamp(0, seqlen_q - 1)[:, None, None].expand(*tree.shape[:3], capacity)
        visible = tree.gather(3, index) | (column < 0)[:, None, None]
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return visible & mask
    return torch.where(visible, mask, float("-inf"))


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
