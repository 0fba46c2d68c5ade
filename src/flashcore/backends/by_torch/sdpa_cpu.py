"""Compute attention of CPU tensors by the fused kernel behind torch's SDPA, in memory linear in
seqlen.

torch's kernel wants as many heads of k and v as of q, equal head_dims and an additive mask; its
is_causal is "upper_left"; and its result for a row with nothing to see differs between versions.
So a call is cut: into one of the heads of each group at a time, and, where positions hide keys,
into blocks of queries, each with the keys that some of them see and a mask of its own. Nothing is
copied but masks, and v or q and k where head_dims differ. Scores with softcap are left to
backends/tiled.py.
"""

from __future__ import annotations

import math

import torch

from flashcore.problem import Problem
from flashcore.problem.memory_layout import with_columns

BLOCK_M = 256  # queries a block: masks stay small beside q, k and v
Tensor = torch.Tensor

# The function of torch's name refuses grouped heads in some versions, and never returns lse.
_operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def means_the_same(problem: Problem) -> bool:
    """Return whether `attention_by_sdpa` computes this very problem; sinks join its result, where
    that is not rounded to two bytes before (backends/sinks.py)."""
    is_known = not (problem.softcap or problem.return_max_score)
    joins = problem.dtype in ("float32", "float64") or not problem.has_sinks
    return problem.device == "cpu" and is_known and joins and not problem.is_empty


def attention_by_sdpa(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Compute a problem.

    Args:
        problem: the description of the call, one that `means_the_same`.
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.

    Returns:
        out, [batch, num_heads_q, seqlen_q, head_dim_v], contiguous, and lse, [batch, num_heads_q,
        seqlen_q]; None where a hidden key that is not finite may have reached a sum.
    """
    rows_shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    out = q.new_empty((*rows_shape, problem.head_dim_v))
    lse = q.new_empty(rows_shape, dtype=problem.lse_dtype)
    q, k, v = _of_equal_width(q, k, v)
    is_causal = problem.window_left == -1 and problem.window_right == problem.diag_offset == 0
    if mask is None and (is_causal or not _has_bounds(problem)):
        _attend(problem, q, k, v, None, is_causal, out, lse)
        return out, lse
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    block_m = BLOCK_M if _has_bounds(problem) else problem.seqlen_q
    for start in range(0, problem.seqlen_q, block_m):
        m = slice(start, min(start + block_m, problem.seqlen_q))
        n = _visible_keys(problem, m)
        if n.start >= n.stop:
            out[:, :, m], lse[:, :, m] = 0.0, -math.inf
            continue
        _attend(
            problem, q[:, :, m], k[:, :, n], v[:, :, n], _mask_of_block(problem, q, mask, m, n),
            False, out[:, :, m], lse[:, :, m],
        )  # fmt: skip
    # A hidden score is -inf plus what was computed, and the sum is NaN for inf and for NaN.
    return None if bool(lse.isnan().any()) else (out, lse)


def _has_bounds(problem: Problem) -> bool:
    return problem.window_left >= 0 or problem.window_right >= 0


def _of_equal_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors with one head_dim, by columns of zeros; and with a contiguous last
    dimension."""
    width = max(q.shape[3], v.shape[3])
    q, k, v = (x if x.shape[3] == width else with_columns(x, width) for x in (q, k, v))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v


def _visible_keys(problem: Problem, m: slice) -> slice:
    """Return the keys that some query of a block may see by its position."""
    begin, end = 0, problem.seqlen_k
    if problem.window_left >= 0:
        begin = max(0, m.start + problem.diag_offset - problem.window_left)
    if problem.window_right >= 0:
        end = min(end, m.stop + problem.diag_offset + problem.window_right)
    return slice(begin, end)


def _mask_of_block(
    problem: Problem, q: Tensor, mask: Tensor | None, m: slice, n: slice
) -> Tensor | None:
    """Return an additive mask with all that hides keys of a block; its sizes are the block's, or
    1."""
    if mask is not None:
        mask = mask[:, :, m] if mask.shape[2] > 1 else mask
        mask = mask[..., n] if mask.shape[3] > 1 else mask.expand(-1, -1, -1, n.stop - n.start)
        if mask.dtype == torch.bool:
            mask = q.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)
        else:
            mask = mask.to(torch.float32 if q.dtype != torch.float64 else q.dtype)
    if not _has_bounds(problem):
        return mask
    i = torch.arange(m.start, m.stop, device=q.device)[:, None] + problem.diag_offset
    j = torch.arange(n.start, n.stop, device=q.device)[None, :]
    hidden = torch.zeros_like(i + j, dtype=torch.bool)
    if problem.window_left >= 0:
        hidden |= j < i - problem.window_left
    if problem.window_right >= 0:
        hidden |= j > i + problem.window_right
    if mask is None:
        mask = q.new_zeros(1, 1, *hidden.shape)
    return mask.masked_fill(hidden, -math.inf)


def _attend(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out and lse, one head of each group at a time."""
    empty = None
    if mask is not None:
        empty = (mask == -math.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(empty, 0.0)
    group_size = problem.num_heads_q // problem.num_heads_kv
    for head in range(group_size):
        heads = slice(head, None, group_size)
        own = mask if mask is None or mask.shape[1] == 1 else mask[:, heads]
        part, part_lse = _operator(
            q[:, heads], k, v, 0.0, is_causal, attn_mask=own, scale=problem.scale
        )
        out[:, heads] = part[..., : problem.head_dim_v]
        lse[:, heads] = part_lse
    if empty is not None and bool(empty.any()):
        out.masked_fill_(empty, 0.0)
        lse.masked_fill_(empty[..., 0], -math.inf)
