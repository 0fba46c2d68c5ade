"""Compute packed and padded calls by plain operations of torch: forward mode and second
derivatives.

Packed sequences go one by one through what computes a dense call, where the host can read their
lengths. Where it cannot (torch.compile traces; vmap maps over them; a meta tensor), all rows are
one call, in which positions hide the other sequences; it takes the time of one long sequence. A
padded batch is always one call.

The functions are those of a Family; see ops/operators.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import without_autocast
from flashcore.backends.packed import (
    max_score_of_rows,
    of_packed,
    readable,
    rows_of_sequences,
)
from flashcore.backends.sinks import packed_gradient_of_sinks
from flashcore.plain.attention import (
    Hidden,
    backward_plain,
    forward_plain,
    largest,
    outside_band,
)
from flashcore.plain.second_order import backward_of_backward
from flashcore.plain.trees import tree_over_packed_keys, with_mask_of_tree
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Inputs, Options, Results
from flashcore.problem.scales import dequantised_inputs
from flashcore.problem.validation import check_mask, check_qkv

Tensors = tuple[Tensor | None, ...]
# Computes a dense call; takes what queries have, what keys have, and what positions hide (None:
# what the options say), all of four dimensions; returns results of queries, and results of keys.
Compute = Callable[[Tensors, Tensors, Hidden | None], tuple[Tensors, Tensors]]


def varlen_forward_plain(inputs: Inputs, options: Options) -> Results:
    """Compute `attention_varlen_forward`; with trees, as of packed queries over pages, all rows are
    one call."""
    q, k, v, cu_q, cu_k, _, _ = of_packed(inputs)
    check_qkv(as_batch(q), as_batch(k), as_batch(v))
    tree = inputs.tree_mask
    if tree is not None:
        tree = tree_over_packed_keys(tree, cu_q, cu_k, q.shape[0], k.shape[0])

    def compute(of_q: Any, of_k: Any, hidden: Hidden | None) -> tuple[Tensors, Tensors]:
        (q,), (k, v) = of_q, of_k
        out, *of_rows = forward_plain(q, k, v, tree, options, hidden, inputs.sinks)
        return (out, *(x.unsqueeze(-1) for x in of_rows)), ()

    of_q, of_k = (as_batch(q),), (as_batch(k), as_batch(v))
    fills = 0.0, -math.inf, -math.inf
    out, lse, row_max = _by_sequence(
        compute, of_q, of_k, cu_q, cu_k, options, fills, as_one=tree is not None
    )
    max_score = max_score_of_rows(_lse_unbatched(row_max), cu_q)
    lse = _lse_unbatched(lse)
    if inputs.sinks is not None:  # of rows that no sequence has, too
        of_rows = inputs.sinks.to(lse.dtype).unsqueeze(-1)
        lse = torch.where(lse == -math.inf, of_rows, lse)
    return Results(_unbatched(out), lse, max_score)


def varlen_backward_plain(arriving: Results, inputs: Inputs, options: Options) -> Tensors:
    """Compute `attention_varlen_backward`."""
    q, k, v, cu_q, cu_k, _, _ = of_packed(inputs)
    dout, dlse = arriving.out, arriving.lse

    def compute(of_q: Any, of_k: Any, hidden: Hidden | None) -> tuple[Tensors, Tensors]:
        (dout, dlse, q), (k, v) = of_q, of_k
        dlse = None if dlse is None else dlse.squeeze(-1)
        dq, dk, dv, *_ = backward_plain(dout, dlse, q, k, v, None, options, hidden, inputs.sinks)
        return (dq,), (dk, dv)

    of_q = (_batched(dout), _lse_batched(dlse), as_batch(q))
    of_k = (as_batch(k), as_batch(v))
    dq, dk, dv = _by_sequence(compute, of_q, of_k, cu_q, cu_k, options, (0.0,))
    dsinks = None
    if inputs.sinks is not None:
        results = varlen_forward_plain(inputs, options)
        dsinks = packed_gradient_of_sinks(inputs, results, arriving)
    return _unbatched(dq), _unbatched(dk), _unbatched(dv), dsinks


def varlen_second_order(
    arriving: Results, inputs: Inputs, cotangents: Tensors, options: Options
) -> Tensors:
    """Return gradients of dout, dlse, q, k, v and sinks from the cotangents of dq, dk, dv and
    dsinks. With sinks all rows are one call, for each has a part in what is of the sinks."""
    q, k, v, cu_q, cu_k, _, _ = of_packed(inputs)
    x, y, z, of_dsinks = cotangents

    def compute(of_q: Any, of_k: Any, hidden: Hidden | None) -> tuple[Tensors, Tensors]:
        (dout, dlse, q, x), (k, v, y, z) = of_q, of_k
        dlse = None if dlse is None else dlse.squeeze(-1)
        of_dout, of_dlse, of_q, of_k, of_v, _, from_sinks = backward_of_backward(
            dout, dlse, q, k, v, None, (x, y, z, None, of_dsinks), options, hidden, inputs.sinks
        )
        return (of_dout, of_dlse.unsqueeze(-1), of_q), (of_k, of_v, from_sinks)

    of_dout, of_dlse, of_q, of_k, of_v, *from_sinks = _by_sequence(
        compute,
        (_batched(arriving.out), _lse_batched(arriving.lse), as_batch(q), _batched(x)),
        (as_batch(k), as_batch(v), _batched(y), _batched(z)),
        cu_q,
        cu_k,
        options,
        (0.0, 0.0, 0.0),
        as_one=inputs.sinks is not None,
    )
    gradients = (_unbatched(of_dout), _lse_unbatched(of_dlse), *map(_unbatched, (of_q, of_k, of_v)))
    return *gradients, *(from_sinks or (None,))


def padded_forward_plain(inputs: Inputs, options: Options) -> Results:
    """Compute `attention_padded_forward`; caches of 8 bits are rounded to the dtype of q."""
    inputs = with_mask_of_tree(dequantised_inputs(inputs))
    q, k, v, mask, *_ = inputs
    check_qkv(q, k, v)
    if mask is not None:
        check_mask(mask, q, k.shape[2])
    k, v, hidden = _behind_hidden(inputs, options)
    out, lse, row_max = forward_plain(q, k, v, mask, options, hidden, inputs.sinks)
    return Results(out, lse, largest(row_max))


def padded_backward_plain(arriving: Results, inputs: Inputs, options: Options) -> Tensors:
    """Compute `attention_padded_backward`."""
    k, v, hidden = _behind_hidden(inputs, options)
    q, mask, sinks = inputs.q, inputs.mask, inputs.sinks
    dq, dk, dv, _, dsinks = backward_plain(
        arriving.out, arriving.lse, q, k, v, mask, options, hidden, sinks
    )
    return dq, dk, dv, dsinks


def padded_second_order(
    arriving: Results, inputs: Inputs, cotangents: Tensors, options: Options
) -> Tensors:
    """Return gradients of dout, dlse, q, k, v and sinks from the cotangents of dq, dk, dv and
    dsinks."""
    x, y, z, of_dsinks = cotangents
    k, v, hidden = _behind_hidden(inputs, options)
    # dk and dv are 0 behind the last key, whatever their cotangents are there.
    beyond = _beyond(inputs).mT
    y, z = (None if c is None else c.masked_fill(beyond, 0.0) for c in (y, z))
    *gradients, _, from_sinks = backward_of_backward(
        arriving.out, arriving.lse, inputs.q, k, v, inputs.mask, (x, y, z, None, of_dsinks),
        options, hidden, inputs.sinks,
    )  # fmt: skip
    return *gradients, from_sinks


def _beyond(inputs: Inputs) -> Tensor:
    """Return [batch, 1, 1, seqlen_k], True behind a sequence's last key."""
    k, seqlens_k = inputs.k, inputs.seqlens_k
    assert seqlens_k is not None
    return torch.arange(k.shape[2], device=k.device) >= seqlens_k[:, None, None, None]


def _behind_hidden(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Hidden]:
    """Return k and v with zeros behind the last key of each sequence, and what positions hide
    then."""
    q, k, v, _, seqlens_k, *_ = inputs
    assert seqlens_k is not None
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    beyond = _beyond(inputs)
    lengths = seqlens_k.long().clamp(0, seqlen_k)[:, None, None, None]
    offset = torch.zeros_like(lengths) if options.causal == "upper_left" else lengths - seqlen_q

    def hidden(m: slice) -> Tensor:
        i = torch.arange(seqlen_q, device=q.device)[m, None] + offset
        return outside_band(options, i, torch.arange(seqlen_k, device=q.device)) | beyond

    return k.masked_fill(beyond.mT, 0.0), v.masked_fill(beyond.mT, 0.0), hidden


def _by_sequence(
    compute: Compute,
    of_q: Tensors,
    of_k: Tensors,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: Options,
    fills: tuple[float, ...],
    as_one: bool = False,
) -> tuple[Tensor, ...]:
    """Return the results of a packed call, [1, num_heads, total, columns] as what it is computed
    from.

    Args:
        compute: see `Compute`.
        of_q: what queries have, q among it.
        of_k: what keys have, k first.
        cu_seqlens_q: int32, [batch + 1].
        cu_seqlens_k: int32, [batch + 1].
        options: of the call.
        fills: what results of queries are where no sequence is.
        as_one: whether all rows are one call, though the lengths can be read.
    """
    q, k = (next(x for x in side if x is not None) for side in (of_q, of_k))
    with without_autocast(q.device.type):
        if as_one or not (readable(cu_seqlens_q) and readable(cu_seqlens_k)):
            of_k, hidden = _others_hidden(q, of_k, cu_seqlens_q, cu_seqlens_k, options)
            own_q, own_k = compute(of_q, of_k, hidden)
            return tuple(x for x in (*own_q, *own_k) if x is not None)
        rows = list(rows_of_sequences(cu_seqlens_q, cu_seqlens_k, q.shape[2], k.shape[2]))
        if not rows:  # nothing but rows of no sequence
            rows = [(slice(0, 0), slice(0, 0))]
        parts = [compute(_rows(of_q, r), _rows(of_k, s), None) for r, s in rows]
        results_q, results_k = zip(*parts, strict=True)
        rows_q, rows_k = zip(*rows, strict=True)
        return (
            *_assembled(results_q, rows_q, q.shape[2], fills),
            *_assembled(results_k, rows_k, k.shape[2], (0.0, 0.0)),
        )


def _assembled(
    parts: tuple[Tensors, ...], rows: tuple[slice, ...], total: int, fills: tuple[float, ...]
) -> Iterator[Tensor]:
    """Return what sequences have, as what all rows have."""
    for pieces, fill in zip(zip(*parts, strict=True), fills, strict=False):
        piece = torch.cat(pieces, dim=2)
        index = torch.cat([torch.arange(r.start, r.stop) for r in rows]).to(piece.device)
        whole = piece.new_full((*piece.shape[:2], total, piece.shape[3]), fill)
        yield whole.index_copy(2, index, piece)


def _rows(tensors: Tensors, rows: slice) -> Tensors:
    return tuple(None if x is None else x[:, :, rows] for x in tensors)


def _others_hidden(
    q: Tensor, of_k: Tensors, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options
) -> tuple[Tensors, Hidden]:
    """Return what keys have, 0 behind the last sequence; and what hides the other sequences'
    keys."""
    k = next(x for x in of_k if x is not None)
    last = cu_seqlens_q.shape[0] - 1
    ends_q, ends_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    rows, keys = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
    sequence_q, sequence_k = (
        (x[:, None] >= ends[1:]).sum(-1) for x, ends in ((rows, ends_q), (keys, ends_k))
    )
    after_q = (sequence_q + 1).clamp(max=last)
    offset = 0 * rows
    if options.causal != "upper_left":
        offset = (ends_k[after_q] - ends_k[sequence_q]) - (ends_q[after_q] - ends_q[sequence_q])
    i, j = rows - ends_q[sequence_q] + offset, keys - ends_k[sequence_k]

    def hidden(m: slice) -> Tensor:
        own = sequence_q[m, None]
        return (own != sequence_k) | (own == last) | outside_band(options, i[m, None], j)

    behind = (sequence_k == last)[:, None]
    return tuple(None if x is None else x.masked_fill(behind, 0.0) for x in of_k), hidden


def _batched(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_batch(x)


def _lse_batched(lse: Tensor | None) -> Tensor | None:
    """Return [num_heads, total] as [1, num_heads, total, 1]."""
    return None if lse is None else lse[None, ..., None]


def _unbatched(x: Tensor) -> Tensor:
    """Return [1, num_heads, total, columns] as [total, num_heads, columns], contiguous."""
    return x.squeeze(0).transpose(0, 1).contiguous()


def _lse_unbatched(lse: Tensor) -> Tensor:
    return lse.squeeze(-1).squeeze(0)
