"""Compute attention and its gradient by plain operations of torch, which every transform can take
apart.

For forward mode (jvp, jacfwd, dual numbers) and for derivatives of derivatives. Rare, hence simple:
nothing happens in place, and all scores of a block of rows exist at once. Without records of
autograd the forward pass takes memory linear in seqlen, with them quadratic. Sizes may be symbolic,
tensors fake.

Within, the heads of q that share a head of k and v are stacked as more rows, as in
backends/tiled.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashcore.backends.tiled import BLOCK_M_MIN, TILE_SCORES
from flashcore.problem.options import Options
from flashcore.problem.validation import certainly

# Of a slice of queries: what the positions hide, True = hidden, broadcastable to the scores of
# these queries, [batch, num_heads_q, queries, seqlen_k].
Hidden = Callable[[slice], Tensor]


class Rows(NamedTuple):
    """Say how the rows of q's heads are stacked.

    Args:
        batch: number of sequences.
        heads_q: heads of q.
        heads_kv: heads of k and v.
        seqlen_q: queries a head.
        dtype: computed in: float32, or float64 for float64 tensors.
    """

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Rows:
        """Return the rows of q's heads."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return cls(q.shape[0], q.shape[1], k.shape[1], q.shape[2], dtype)

    def stacked(self, x: Tensor) -> Tensor:
        """Stack heads as rows: [batch, num_heads_q, seqlen_q, c] -> [batch, num_heads_kv,
        group_size * seqlen_q, c]."""
        rows = self.heads_q // max(self.heads_kv, 1) * self.seqlen_q
        return x.to(self.dtype).reshape(self.batch, self.heads_kv, rows, x.shape[3])

    def by_head(self, x: Tensor) -> Tensor:
        """Undo `stacked`: [batch, num_heads_kv, group_size * seqlen_q, c] -> [batch, num_heads_q,
        seqlen_q, c]."""
        return x.reshape(self.batch, self.heads_q, self.seqlen_q, x.shape[3])


class Weights(NamedTuple):
    """Weights hold the softmax of scores, all stacked: [batch, num_heads_kv, group_size * seqlen_q,
    ..].

    With sinks there is one more key, the last one: its score is the sink, its value 0.

    Args:
        p: the weights, [.., seqlen_k]; 0 in empty rows.
        lse: [.., 1], -inf in empty rows.
        empty: [.., 1], True where a row has nothing to attend to.
        slope: the derivative of softcap(scale * q.k) by its argument, [.., seqlen_k]; None is 1.
        bend: the second derivative of the same, [.., seqlen_k]; None is 0.
    """

    p: Tensor
    lse: Tensor
    empty: Tensor
    slope: Tensor | None
    bend: Tensor | None


def scale_of(options: Options, q: Tensor) -> float:
    """Return the scale that the options mean for q's head_dim."""
    return 1.0 / math.sqrt(q.shape[3]) if options.scale is None else options.scale


def weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    options: Options,
    hidden: Tensor,
    rows: Rows,
    sinks: Tensor | None,
) -> Weights:
    """Compute the weights of attention, and what its derivatives need besides.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        options: of the call; positions are in `hidden`.
        hidden: see `Hidden`.
        rows: of q and k.
        sinks: [num_heads_q], or None.

    Returns:
        See `Weights`.
    """
    score = rows.stacked(q) @ k.to(rows.dtype).mT * scale_of(options, q)
    slope = bend = None
    if not certainly(options.softcap == 0.0):
        tanh = torch.tanh(score / options.softcap)
        score, slope = tanh * options.softcap, 1.0 - tanh * tanh
        bend = -2.0 / options.softcap * tanh * slope
    score = rows.by_head(score)
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else score + mask
    score = score.masked_fill(hidden, -math.inf)
    if sinks is not None:
        of_rows = sinks.to(rows.dtype)[:, None, None].expand(*score.shape[:3], 1)
        score = torch.cat([score, of_rows], dim=-1)
        if slope is not None and bend is not None:
            slope, bend = with_sink(slope, sinks, 1.0), with_sink(bend, sinks)
    score = rows.stacked(score)
    empty = torch.all(score == -math.inf, dim=-1, keepdim=True)
    score = score.masked_fill(empty, 0.0)
    lse = torch.logsumexp(score, dim=-1, keepdim=True).masked_fill(empty, -math.inf)
    return Weights(torch.softmax(score, dim=-1).masked_fill(empty, 0.0), lse, empty, slope, bend)


def forward_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
    hidden: Hidden | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention of [batch, num_heads, seqlen, head_dim] tensors.

    Args:
        q: as in `attention`, like k, v and mask.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        options: of the call.
        hidden: what positions hide; None: what the options say.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.

    Returns:
        out, [batch, num_heads_q, seqlen_q, head_dim_v], and lse and the largest score of each row,
        [batch, num_heads_q, seqlen_q]; the last has no gradient.
    """
    hidden = band(options, q, k) if hidden is None else hidden
    parts = []
    for m in _blocks_of_rows(q, k):
        part = q[:, :, m]
        rows = Rows.of(part, k)
        mask_part = mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] != 1:
            mask_part = mask[..., m, :]
        asked = part, k, mask_part, options, hidden(m), rows
        p, lse, *_ = weights(*asked, sinks)
        # The largest weight is that of the largest score; beside a large sink it may vanish.
        of_keys, lse_of_keys, *_ = (p, lse) if sinks is None else weights(*asked, None)
        row_max = lse_of_keys + largest(of_keys).clamp(min=0.0).log().unsqueeze(-1)
        row_max, p = row_max.detach(), without_sink(p, sinks)
        parts.append((rows.by_head(p @ v.to(rows.dtype)), rows.by_head(lse), rows.by_head(row_max)))
    out, lse, row_max = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out.to(q.dtype), lse.squeeze(-1), row_max.squeeze(-1)


def largest(x: Tensor) -> Tensor:
    """Return the largest element along the last dimension, -inf if it has none."""
    return torch.cat((x, x.new_full((*x.shape[:-1], 1), -math.inf)), dim=-1).amax(-1)


def backward_plain(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
    hidden: Hidden | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute attention's gradient, as plain/second_order.py writes it.

    Args:
        dout: [batch, num_heads_q, seqlen_q, head_dim_v], or None for zero.
        dlse: [batch, num_heads_q, seqlen_q], or None for zero.
        q: as in `forward_plain`, like all that follow.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: or None.
        options: of the call.
        hidden: what positions hide.
        sinks: or None.

    Returns:
        Gradients of q, k, v, an additive mask and sinks.
    """
    rows, scale = Rows.of(q, k), scale_of(options, q)
    hidden = band(options, q, k) if hidden is None else hidden
    p, _, empty, slope, _ = weights(q, k, mask, options, hidden(slice(None)), rows, sinks)
    dout_, dlse_ = arriving(dout, dlse, q, v, empty, rows)
    dp = with_sink(dout_ @ v.to(rows.dtype).mT, sinks)
    g = p * (dp - (p * dp).sum(-1, keepdim=True) + dlse_)
    dsinks = of_sinks(g, sinks, rows)
    dt = without_sink(g if slope is None else g * slope, sinks) * scale
    p, g = without_sink(p, sinks), without_sink(g, sinks)
    dmask = None
    if mask is not None and mask.dtype != torch.bool:
        dmask = rows.by_head(g).sum_to_size(mask.shape).to(mask.dtype)
    dq = rows.by_head(dt @ k.to(rows.dtype)).to(q.dtype)
    dk, dv = (dt.mT @ rows.stacked(q)).to(k.dtype), (p.mT @ dout_).to(v.dtype)
    return dq, dk, dv, dmask, dsinks


def with_sink(x: Tensor, sinks: Tensor | None, value: float = 0.0) -> Tensor:
    """Return what keys have, [.., seqlen_k], with a column for the sink where there is one."""
    if sinks is None:
        return x
    return torch.cat([x, torch.full_like(x[..., :1], value)], dim=-1)


def without_sink(x: Tensor, sinks: Tensor | None) -> Tensor:
    """Return what keys have without the sink's column."""
    return x if sinks is None else x[..., :-1]


def of_sinks(x: Tensor, sinks: Tensor | None, rows: Rows) -> Tensor | None:
    """Return the sum of the sink's column over the rows of each head, as a gradient of sinks."""
    if sinks is None:
        return None
    return rows.by_head(x[..., -1:]).sum(dim=(0, 2, 3)).to(sinks.dtype)


def arriving(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, v: Tensor, empty: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Return the gradients of out and lse, stacked. Whatever arrives at an empty row stops
    there."""
    if dout is None:
        dout = q.new_zeros((*q.shape[:3], v.shape[3]))
    dlse = q.new_zeros(q.shape[:3]) if dlse is None else dlse
    return (
        rows.stacked(dout).masked_fill(empty, 0.0),
        rows.stacked(dlse.unsqueeze(-1)).masked_fill(empty, 0.0),
    )


def band(options: Options, q: Tensor, k: Tensor) -> Hidden:
    """Return what causal masks and windows hide in one pair of lengths."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    offset = 0 if options.causal == "upper_left" else seqlen_k - seqlen_q

    def hidden(m: slice) -> Tensor:
        i = torch.arange(seqlen_q, device=q.device)[m, None] + offset
        return outside_band(options, i, torch.arange(seqlen_k, device=q.device))

    return hidden


def outside_band(options: Options, i: Tensor, j: Tensor) -> Tensor:
    """Return True where key j is hidden from a query that is aligned with key i; i and j
    broadcast."""
    left, right = options.window_left, options.window_right
    hidden = torch.zeros_like(j < i)
    if left >= 0:
        hidden = hidden | (j < i - left)
    if options.causal != "none":
        return hidden | (j > i)
    return hidden | (j > i + right) if right >= 0 else hidden


def _blocks_of_rows(q: Tensor, k: Tensor) -> list[slice]:
    """Return slices of queries whose scores are held at once."""
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if not all(isinstance(size, int) for size in sizes):
        return [slice(None)]  # symbolic
    batch, heads, seqlen_q, seqlen_k = sizes
    block_m = max(BLOCK_M_MIN, TILE_SCORES // max(1, batch * heads * seqlen_k))
    return [slice(begin, begin + block_m) for begin in range(0, max(1, seqlen_q), block_m)]
