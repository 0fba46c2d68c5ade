"""Make masks over all keys out of masks of the last ones, of trees of drafts; take the part of a
mask that one sequence has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashcore.problem.options import Inputs


def tree_over_keys(
    tree: Tensor, mask: Tensor | None, q: Tensor, lengths: Tensor, seqlen_k: int
) -> Tensor:
    """Return a mask over keys: the last seqlen_q of each sequence by a tree, those before are
    visible.

    Args:
        tree: boolean, broadcastable to [batch, num_heads_q, seqlen_q, seqlen_q]; checked.
        mask: another, over the keys, that holds besides; or None.
        q: [batch, num_heads_q, seqlen_q, head_dim].
        lengths: int32, [batch]: keys of each sequence, those of the queries among them; clamped.
        seqlen_k: keys that a sequence has room for.

    Returns:
        [batch, 1 or num_heads_q, seqlen_q, seqlen_k]: boolean, or as mask.
    """
    seqlen_q = q.shape[2]
    tree = tree[(None,) * (4 - tree.dim())]
    tree = tree.expand(q.shape[0], tree.shape[1], seqlen_q, seqlen_q)
    # Key j is the tree's column j - (length - seqlen_q).
    last = lengths.clamp(0, seqlen_k).long() - seqlen_q
    column = torch.arange(seqlen_k, device=q.device) - last[:, None]
    if seqlen_q == 0:
        visible = tree.new_ones((*tree.shape[:3], seqlen_k))
    else:
        index = column.clamp(0, seqlen_q - 1)[:, None, None].expand(*tree.shape[:3], seqlen_k)
        visible = tree.gather(3, index) | (column < 0)[:, None, None]
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return visible & mask
    return torch.where(visible, mask, float("-inf"))


def tree_of_sequence(tree: Tensor, seqlen_q: int, n: int) -> Tensor:
    """Return the mask over one sequence's n keys, of its queries, that its tree amounts to.

    Args:
        tree: boolean, [.., seqlen_q, seqlen_q], the last two broadcastable.
        seqlen_q: queries.
        n: keys, those of the queries among them.
    """
    tree = tree.expand(*tree.shape[:-1], seqlen_q)
    return pad(tree, (n - seqlen_q, 0), value=True)


def with_mask_of_tree(inputs: Inputs) -> Inputs:
    """Return the call of padded sequences with a mask over all keys instead of a tree."""
    if inputs.tree_mask is None:
        return inputs
    assert inputs.seqlens_k is not None
    lengths, room = inputs.seqlens_k, inputs.k.shape[2]
    mask = tree_over_keys(inputs.tree_mask, inputs.mask, inputs.q, lengths, room)
    return inputs._replace(mask=mask, tree_mask=None)


def part_of_mask(mask: Tensor | None, b: slice, n: int) -> Tensor | None:
    """Return a sequence's part of a mask that broadcasts."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[b] if mask.shape[0] > 1 else mask
    return mask[..., :n] if mask.shape[3] > 1 else mask


def part_of_tree(tree: Tensor, b: slice, seqlen_q: int, n: int) -> Tensor:
    """Return the mask over a sequence's n keys that a tree which broadcasts amounts to."""
    tree = tree[(None,) * (4 - tree.dim())]
    return tree_of_sequence(tree[b] if tree.shape[0] > 1 else tree, seqlen_q, n)
