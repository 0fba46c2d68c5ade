"""Make masks over all keys out of masks of the last ones, of trees of drafts; take the part of a
mask that one sequence has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashcore.problem.options import Inputs
from flashcore.problem.validation import tree_size


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
    mask = _own(mask, b)
    return mask[..., :n] if mask.shape[3] > 1 else mask


def part_of_tree(tree: Tensor, b: slice, seqlen_q: int, n: int) -> Tensor:
    """Return the mask over a sequence's n keys that a tree which broadcasts amounts to."""
    return tree_of_sequence(_own(tree, b), seqlen_q, n)


def tree_over_packed_keys(
    tree: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int
) -> Tensor:
    """Return a mask over all keys of packed sequences, in which trees hide some of each sequence's
    own; of others' it says nothing.

    Args:
        tree: boolean, broadcastable to [batch, num_heads_q, m, m]; of a sequence of n <= m queries
            [0, n) counts, of a longer one nothing.
        cu_seqlens_q: int32, [batch + 1].
        cu_seqlens_k: int32, [batch + 1].
        total_q: rows of packed queries.
        total_k: rows of packed keys.

    Returns:
        [1, 1 or num_heads_q, total_q, total_k], boolean.
    """
    batch, size = cu_seqlens_q.shape[0] - 1, tree_size(tree)
    if batch == 0 or size == 0:
        return tree.new_ones((1, 1, total_q, total_k))
    ends_q, ends_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    row = torch.arange(total_q, device=tree.device)
    b = (row[:, None] >= ends_q[1:]).sum(-1).clamp(max=batch - 1)
    number = ends_q[b + 1] - ends_q[b]
    i = (row - ends_q[b]).clamp(0, size - 1)
    of_row = _whole(tree, batch, size)[b, :, i]  # [total_q, heads, m]
    # Key t is column n - (end - t) of the tree of a sequence of n queries.
    column = torch.arange(total_k, device=tree.device) - (ends_k[b + 1] - number)[:, None]
    index = column.clamp(0, size - 1)[:, None].expand(-1, of_row.shape[1], -1)
    is_free = (column < 0) | (number > size)[:, None]
    return (of_row.gather(2, index) | is_free[:, None]).transpose(0, 1)[None]


def tree_of_padded(tree: Tensor, number: Tensor, longest: int) -> Tensor:
    """Return the trees of packed queries as those of padded ones, which stand at the end of a
    sequence's rows: their trees in the lower right corners, True elsewhere.

    Args:
        tree: as `tree_over_packed_keys` takes it.
        number: int32, [batch]: the queries of each sequence.
        longest: rows of each.

    Returns:
        [batch, 1 or num_heads_q, longest, longest], boolean.
    """
    batch, size = number.shape[0], tree_size(tree)
    if size == 0:
        return tree.new_ones((batch, 1, longest, longest))
    place = torch.arange(longest, device=tree.device) - (longest - number.long())[:, None]
    b = torch.arange(batch, device=tree.device)[:, None, None]
    i, is_before = place.clamp(0, size - 1), place < 0
    found = _whole(tree, batch, size)[b, :, i[:, :, None], i[:, None]]  # heads last
    is_free = is_before[:, :, None] | is_before[:, None] | (number > size)[:, None, None]
    return (found | is_free[..., None]).permute(0, 3, 1, 2)


def packed_part_of_tree(tree: Tensor, b: int, seqlen_q: int) -> Tensor | None:
    """Return the tree of one packed sequence, [1, 1 or num_heads_q, seqlen_q, seqlen_q]; None for
    a sequence of more queries than it has rows."""
    size = tree_size(tree)
    if seqlen_q > size:
        return None
    own = _own(tree, slice(b, b + 1))
    return own.expand(1, own.shape[1], size, size)[:, :, :seqlen_q, :seqlen_q]


def _own(x: Tensor, b: slice) -> Tensor:
    """Return what sequences have of a mask or tree that broadcasts, with four dimensions."""
    x = x[(None,) * (4 - x.dim())]
    return x[b] if x.shape[0] > 1 else x


def _whole(tree: Tensor, batch: int, size: int) -> Tensor:
    """Return a tree that broadcasts as [batch, 1 or num_heads_q, size, size]."""
    tree = tree[(None,) * (4 - tree.dim())]
    return tree.expand(batch, tree.shape[1], size, size)
