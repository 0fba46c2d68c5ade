"""Compute attention and its gradient tile by tile in PyTorch: memory linear in seqlen, any device.

It serves CPU tensors, the dtypes that no kernel serves, and every backend's backward pass.

Notation follows FlashAttention-2 (arXiv:2307.08691, algorithms 1 and 2). Within a tile, the
group_size heads of q that share a head of k and v are stacked as more rows ([group_size * rows]),
so that grouped-query attention is one ordinary matmul and k and v are never copied per head.
Everything is computed in float32, in float64 for float64 inputs; only results are rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flashcore.launch.types import Call, Computed
from flashcore.problem import Problem

# Scores held at once: 2**21 float32 are 8 MiB, small beside q, k and v wherever time matters.
TILE_SCORES = 2**21
BLOCK_N_MAX = 512
BLOCK_M_MIN, BLOCK_M_MAX = 16, 512


def one_by_one(
    run: Call,
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *sinks: torch.Tensor | None,
) -> Computed:
    """Return what `run` does, with each sequence by itself: who is beside it would change sums."""
    own, results = dataclasses.replace(problem, batch=1), []
    for b in range(problem.batch):
        has_own_mask = mask is not None and mask.dim() == 4 and mask.shape[0] > 1
        part = mask[b : b + 1] if mask is not None and has_own_mask else mask
        of_b = (x[b : b + 1] for x in (q, k, v))
        results.append(run(own, *of_b, part, (), *sinks))
    joined = (None if xs[0] is None else torch.cat(xs) for xs in zip(*results, strict=True))
    return tuple(joined)


def attention_tiled(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    row_maxima: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the forward pass by online softmax.

    Args:
        problem: the description of the call.
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        row_maxima: where the largest score of each row is written, dtype and shape of lse; or None.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.

    Returns:
        out: dtype of q, [batch, num_heads_q, seqlen_q, head_dim_v].
        lse: float32 (float64 for float64 inputs), [batch, num_heads_q, seqlen_q], natural log.
    """
    tiles = Tiles(problem, q, k, v, mask)
    rows_shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    out = q.new_zeros((*rows_shape, problem.head_dim_v))
    lse = q.new_full(rows_shape, -math.inf, dtype=tiles.dtype)
    for m in tiles.m_blocks():
        q_tile = tiles.rows(q, m)
        row_max = q_tile.new_full((*q_tile.shape[:3], 1), -math.inf)
        row_sum = torch.zeros_like(row_max)
        accum = q_tile.new_zeros((*q_tile.shape[:3], problem.head_dim_v))
        for n in tiles.n_blocks(m):
            score, _ = tiles.scores(q_tile, tiles.keys(k, n), m, n)
            new_max = torch.maximum(row_max, score.amax(dim=-1, keepdim=True))
            # A row that has seen no key yet: subtract 0, for -inf - -inf is NaN.
            shift = new_max.masked_fill(new_max == -math.inf, 0.0)
            weight = torch.exp(score.sub_(shift))
            rescale = torch.exp(row_max - shift)
            row_sum = row_sum * rescale + weight.sum(dim=-1, keepdim=True)
            accum = accum.mul_(rescale).add_(weight @ tiles.keys(v, n))
            row_max = new_max
        if row_maxima is not None:
            row_maxima[:, :, m] = tiles.to_heads(row_max).squeeze(-1)
        if sinks is not None:  # one more key, whose value is 0
            sink = tiles.rows(sinks[:, None, None].expand(*rows_shape, 1), m)
            new_max = torch.maximum(row_max, sink)
            shift = new_max.masked_fill(new_max == -math.inf, 0.0)
            rescale = torch.exp(row_max - shift)
            row_sum = row_sum * rescale + torch.exp(sink - shift)
            accum.mul_(rescale)
            row_max = new_max
        # row_sum is 0 exactly in empty rows (elsewhere the maximum contributes 1); NaN stays NaN.
        empty = row_sum == 0.0
        accum = accum.div_(row_sum.masked_fill(empty, 1.0))
        out[:, :, m] = tiles.to_heads(accum)
        lse[:, :, m] = tiles.to_heads(row_max + row_sum.log()).squeeze(-1)
    return out, lse


def attention_backward_tiled(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    needs_mask_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute the backward pass; it recomputes the scores tile by tile.

    With p = exp(score - lse) and delta = sum(dout * out) - dlse per row, the gradient of a score is
    p * (dout.v - delta): the first term of delta is the softmax's, the second flows through lse.

    Args:
        problem: the description of the call.
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        out: the forward's output.
        lse: the forward's lse.
        dout: gradient of out, or None for zero.
        dlse: gradient of lse, or None for zero.
        needs_mask_grad: whether to compute the gradient of an additive mask.

    Returns:
        dq, dk, dv: shapes and dtypes of q, k, v; what an empty row would contribute is 0.
        dmask: shape and dtype of mask (summed where it was broadcast), or None.
    """
    tiles = Tiles(problem, q, k, v, mask)
    dq, dk, dv = (torch.zeros_like(x, dtype=tiles.dtype) for x in (q, k, v))
    dmask = (
        torch.zeros_like(mask, dtype=tiles.dtype) if needs_mask_grad and mask is not None else None
    )
    for m in tiles.m_blocks():
        q_tile = tiles.rows(q, m)
        lse_tile = tiles.rows(lse.unsqueeze(-1), m)
        # Whatever gradient arrives at an empty row (NaN too, e.g. from exp(lse - lse)) stops here.
        empty = lse_tile == -math.inf
        lse_tile = lse_tile.masked_fill(empty, 0.0)
        delta = torch.zeros_like(lse_tile)
        dout_tile = None
        if dout is not None:
            dout_tile = tiles.rows(dout, m).masked_fill(empty, 0.0)
            delta += (dout_tile * tiles.rows(out, m)).sum(dim=-1, keepdim=True)
        if dlse is not None:
            delta -= tiles.rows(dlse.unsqueeze(-1), m).masked_fill(empty, 0.0)
        dq_tile = torch.zeros_like(q_tile)
        for n in tiles.n_blocks(m):
            k_tile = tiles.keys(k, n)
            score, dcap = tiles.scores(q_tile, k_tile, m, n)
            weight = torch.exp(score.sub_(lse_tile))
            if dout_tile is None:
                dscore = weight * -delta
            else:
                dv[:, :, n] += weight.transpose(-1, -2) @ dout_tile
                dscore = weight.mul_((dout_tile @ tiles.keys(v, n).transpose(-1, -2)).sub_(delta))
            if dmask is not None:
                tile = tiles.mask_tile(dmask, m, n)
                tile += tiles.to_heads(dscore).sum_to_size(tile.shape)
            if dcap is not None:
                dscore = dscore * dcap
            dscore = dscore * problem.scale
            dq_tile += dscore @ k_tile
            dk[:, :, n] += dscore.transpose(-1, -2) @ q_tile
        dq[:, :, m] = tiles.to_heads(dq_tile)
    if dmask is not None and mask is not None:
        dmask = dmask.to(mask.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask


@dataclass(frozen=True, slots=True)
class Tiles:
    """Cut tensors into tiles in the stacked layout [batch, num_heads_kv, rows, columns]."""

    problem: Problem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Return what is computed in."""
        return self.problem.lse_dtype

    def m_blocks(self) -> Iterator[slice]:
        """Return slices of queries."""
        p = self.problem
        if p.is_empty:
            return
        wanted = TILE_SCORES // (p.batch * p.num_heads_q * min(BLOCK_N_MAX, p.seqlen_k))
        block_m = max(BLOCK_M_MIN, min(BLOCK_M_MAX, wanted))
        for begin in range(0, p.seqlen_q, block_m):
            yield slice(begin, min(begin + block_m, p.seqlen_q))

    def n_blocks(self, m: slice) -> Iterator[slice]:
        """Return slices of the keys that some query of `m` may see by its position."""
        p = self.problem
        begin, end = 0, p.seqlen_k
        if p.window_left >= 0:
            begin = max(0, m.start + p.diag_offset - p.window_left)
        if p.window_right >= 0:
            end = min(end, m.stop + p.diag_offset + p.window_right)
        for start in range(begin, end, BLOCK_N_MAX):
            yield slice(start, min(start + BLOCK_N_MAX, end))

    def rows(self, x: torch.Tensor, m: slice) -> torch.Tensor:
        """Return [batch, num_heads_q, seqlen_q, c] -> [batch, num_heads_kv, group_size * rows,
        c]."""
        tile = x[:, :, m].to(self.dtype)
        return tile.reshape(tile.shape[0], self.problem.num_heads_kv, -1, tile.shape[3])

    def keys(self, x: torch.Tensor, n: slice) -> torch.Tensor:
        """Return rows `n` of k or v."""
        return x[:, :, n].to(self.dtype)

    def to_heads(self, tile: torch.Tensor) -> torch.Tensor:
        """Return [batch, num_heads_kv, group_size * rows, c] -> [batch, num_heads_q, rows, c]."""
        return tile.view(tile.shape[0], self.problem.num_heads_q, -1, tile.shape[3])

    def mask_tile(self, mask: torch.Tensor, m: slice, n: slice) -> torch.Tensor:
        """Return the part of `mask` for queries `m` and keys `n`: a view, broadcast sizes stay
        1."""
        tile = mask[(None,) * (4 - mask.dim())]
        tile = tile[:, :, m] if tile.shape[2] > 1 else tile
        return tile[:, :, :, n] if tile.shape[3] > 1 else tile

    def scores(
        self, q_tile: torch.Tensor, k_tile: torch.Tensor, m: slice, n: slice
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scores of a tile, -inf where hidden; and the softcap's derivative, None without
        one."""
        p = self.problem
        score = (q_tile @ k_tile.transpose(-1, -2)).mul_(p.scale)
        dcap = None
        if p.softcap:
            tanh = score.div_(p.softcap).tanh_()
            dcap = 1.0 - tanh * tanh
            score = tanh * p.softcap
        by_head = self.to_heads(score)
        hidden = self.hidden(m, n)
        if hidden is not None:
            by_head.masked_fill_(hidden, -math.inf)
        if self.mask is not None:
            mask = self.mask_tile(self.mask, m, n)
            if mask.dtype == torch.bool:
                by_head.masked_fill_(~mask, -math.inf)
            else:
                by_head.add_(mask)
        return score, dcap

    def hidden(self, m: slice, n: slice) -> torch.Tensor | None:
        """Return [rows, columns], True where the position hides a key; None where it hides none."""
        p = self.problem
        first, last = m.start + p.diag_offset, m.stop - 1 + p.diag_offset
        cut_left = p.window_left >= 0 and n.start < last - p.window_left
        cut_right = p.window_right >= 0 and n.stop - 1 > first + p.window_right
        if not (cut_left or cut_right):
            return None
        i = torch.arange(m.start, m.stop, device=self.q.device)[:, None] + p.diag_offset
        j = torch.arange(n.start, n.stop, device=self.q.device)[None, :]
        if not cut_right:
            return j < i - p.window_left
        if not cut_left:
            return j > i + p.window_right
        return (j < i - p.window_left) | (j > i + p.window_right)
