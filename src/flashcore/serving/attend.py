"""Attend to a cache whose tokens are all there: choose the function that reads it as it lies."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flashcore.api import attention
from flashcore.errors import FallbackWarning, stacklevel_of_caller
from flashcore.ops.padded import attention_padded
from flashcore.ops.paged import attention_paged
from flashcore.ops.paged_varlen import attention_paged_varlen
from flashcore.ops.varlen import attention_varlen
from flashcore.problem.options import Inputs
from flashcore.serving.pages import capacity_of, gather_packed, gather_padded, one_page_each
from flashcore.serving.rows import Rows, lengths_of_keys, number_of

# PyTorch is given padded queries where that makes at most so many rows of each: it computes packed
# sequences one after the other. Kernels share keys and row tiles of packed queries, and padding
# takes 35 to 50 us of an H200 (docs/ladder.md).
PADDED_ROWS_MAX = 2

_warned: set[str] = set()


def attend_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None,
    seqlens_k: Tensor,
    leftpad: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    mask: Tensor | None,
    tree_mask: Tensor | None,
    backend: str,
    options: dict[str, Any],
    return_lse: bool,
) -> tuple[Tensor, ...]:
    """Attend to the first seqlens_k tokens of each sequence of a cache.

    A contiguous cache is read in place by `attention`, pages by `attention_paged`, or by
    `attention_paged_varlen` for packed queries. With padding on the left, which none of them takes,
    tokens are copied into one piece. The others clamp lengths themselves: that takes no launch.

    Returns:
        out, and lse with return_lse.
    """
    options = {**options, "return_lse": return_lse, "backend": backend}
    if page_table is None and leftpad is None and cu_seqlens_q is None:
        return _contiguous(q, k_cache, v_cache, seqlens_k, mask, tree_mask, options)
    if page_table is None:
        page_table = one_page_each(k_cache)
    capacity = capacity_of(k_cache, page_table)
    readable = is_readable(k_cache, leftpad)
    if cu_seqlens_q is None:
        if readable:
            return _several(
                attention_paged(
                    q, k_cache, v_cache, page_table, seqlens_k, mask=mask, tree_mask=tree_mask,
                    **options,
                )
            )  # fmt: skip
        _warn_of_copy(q, backend)
        k, v = (gather_padded(x, page_table, leftpad) for x in (k_cache, v_cache))
        lengths = lengths_of_keys(seqlens_k, capacity, leftpad)
        return _contiguous(q, k, v, lengths, mask, tree_mask, options)
    batch, longest = page_table.shape[0], q.shape[0] if max_seqlen_q is None else max_seqlen_q
    if readable and isinstance(longest, int) and pads(q, batch, longest, backend, options):
        padded = _padded(q, cu_seqlens_q, longest)
        results = _several(
            attention_paged(padded, k_cache, v_cache, page_table, seqlens_k, **options)
        )
        return _packed(results, q, cu_seqlens_q, longest, options["sinks"])
    if readable:
        return _several(
            attention_paged_varlen(
                q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, longest, **options
            )
        )
    _warn_of_copy(q, backend)
    scales = options.pop("k_scale"), options.pop("v_scale")
    lengths = lengths_of_keys(seqlens_k, capacity, leftpad)
    k, v, cu_seqlens_k = gather_packed(
        (k_cache, v_cache), page_table, leftpad, lengths, q.dtype, scales
    )
    return _several(
        attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, capacity, **options)
    )


def is_readable(k_cache: Tensor, leftpad: Tensor | None) -> bool:
    """Return whether kernels may read a cache in place: it holds tokens, and all that it has
    count."""
    return leftpad is None and k_cache.shape[0] > 0 and k_cache.shape[2] > 0


def pads(q: Tensor, batch: int, longest: int, backend: str, options: dict[str, Any]) -> bool:
    """Return whether packed queries are padded.

    Args:
        q: [total_q, num_heads_q, head_dim].
        batch: sequences.
        longest: a bound on the queries of each.
        backend: of the call.
        options: of `attention`.
    """
    if (
        options["causal"] == "upper_left"
        or options["batch_invariant"]  # whether it pays depends on who else is there
        or not 0 < batch * longest <= PADDED_ROWS_MAX * q.shape[0]
    ):
        return False
    return not q.is_cuda or backend == "torch"


def _contiguous(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    tree_mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Attend to the first keys of each row of a cache; `attention` takes no tree."""
    if tree_mask is None:
        return _several(attention(q, k, v, seqlens_k=lengths, mask=mask, **options))
    others = {name: options[name] for name in ("sinks", "k_scale", "v_scale")}
    asked = {name: x for name, x in options.items() if name not in others}
    inputs = Inputs(q, k, v, seqlens_k=lengths, tree_mask=tree_mask, **others)
    return _several(attention_padded(inputs, return_max_score=False, **asked))


def _several(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _padded(q: Tensor, cu_seqlens_q: Tensor, longest: int) -> Tensor:
    """Return packed queries as [batch, num_heads_q, longest, head_dim], each sequence's at the end,
    where masks are aligned; before them stand any others."""
    ends = cu_seqlens_q[1:].long().clamp(0, q.shape[0])
    row = ends[:, None] - longest + torch.arange(longest, device=q.device)
    return q[row.clamp(0, q.shape[0] - 1)].transpose(1, 2)


def _packed(
    results: tuple[Tensor, ...],
    q: Tensor,
    cu_seqlens_q: Tensor,
    longest: int,
    sinks: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return results of padded queries as those of packed ones; in rows of no sequence 0 and -inf,
    or the sinks."""
    rows = Rows.of(q, cu_seqlens_q)
    number = number_of(q, cu_seqlens_q)
    assert isinstance(number, Tensor)
    assert rows.is_any is not None
    place = (rows.token + longest - number[rows.sequence]).clamp(0, longest - 1)
    out = results[0].transpose(1, 2)[rows.sequence, place]
    packed = [out.masked_fill(~rows.is_any[:, None, None], 0.0)]
    for lse in results[1:]:
        by_row = lse.transpose(1, 2)[rows.sequence, place]
        unseen = lse.new_full((), -math.inf) if sinks is None else sinks.to(lse.dtype)
        packed.append(torch.where(rows.is_any[:, None], by_row, unseen).t().contiguous())
    return tuple(packed)


def _warn_of_copy(q: Tensor, backend: str) -> None:
    """Say once that no kernel reads a cache in place with cache_leftpad."""
    if not q.is_cuda or backend == "torch" or is_compiling() or "cache_leftpad" in _warned:
        return
    _warned.add("cache_leftpad")
    warnings.warn(
        "flashcore.attention_with_kvcache copies the cache's tokens into one piece: with "
        "cache_leftpad no kernel reads it in place; filter flashcore.FallbackWarning to silence "
        "this",
        FallbackWarning,
        stacklevel=stacklevel_of_caller(),
    )
