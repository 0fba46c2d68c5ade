"""Compute flash-attn's functions over a cache, of version 2 and of pages, by
`attention_with_kvcache`."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.dropins.flash_over_cache import (
    NAMES_WITH_BLOCKS,
    attend_over_cache,
    attend_without_gradients,
    key_of,
    scales_given,
)
from flashcore.problem.spelling import OF_FLASH_ATTN_CACHE, other_names, refuse
from flashcore.serving.known_steps import Unknown, attend_known

_NAMES_OF_PAGES = NAMES_WITH_BLOCKS | {
    "k_cache": "k", "v_cache": "v", "seqlens_k": "seqused_k", "return_lse": "return_attn_probs",
}  # fmt: skip


@other_names(OF_FLASH_ATTN_CACHE)
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    **_unknown: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what flash_attn.flash_attn_with_kvcache does: append k and v to the caches, in place,
    and attend to all that is there.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim].
        k_cache: [batch_cache, seqlen_cache, num_heads_kv, head_dim]; with block_table
            [num_pages, page_size, num_heads_kv, head_dim]. Read and written in place.
        v_cache: likewise, with head_dim_v.
        k: [batch, seqlen_new, num_heads_kv, head_dim], or None: the caches have all.
        v: likewise, with head_dim_v.
        rotary_cos: [positions, rotary_dim / 2]: rotates k at cache_seqlens, cache_seqlens + 1 ...;
            q too with causal or a window, else all of q at cache_seqlens. It needs k.
        rotary_sin: likewise.
        cache_seqlens: int32, [batch], or an int for all: tokens in the cache before the call; by
            default it is full. Out of range, it counts as 0 or as full.
        cache_batch_idx: int32, [batch]: the row of the cache of each sequence.
        cache_leftpad: int32, [batch]: where each sequence begins in its row.
        block_table: int32, [batch, pages of the longest sequence]; pages of any size.
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: query i sees keys up to i + seqlen_k - seqlen_q, by each sequence's own length.
        window_size: (left, right) keys around that one; -1 is unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        rotary_interleaved: elements 0 and 1, 2 and 3 ... are pairs; False: 0 and rotary_dim / 2 ...
        alibi_slopes: [num_heads_q] or [batch, num_heads_q]; takes a bias of [batch, num_heads_q,
            seqlen_q, seqlen_cache] in float32.
        num_splits: without effect; how keys are split is chosen for each call.
        return_softmax_lse: also return the log-sum-exp of the scores.

    Returns:
        out: [batch, seqlen_q, num_heads_q, head_dim_v], contiguous. With return_softmax_lse the
        pair (out, lse), lse float32 [batch, num_heads_q, seqlen_q]. Neither has a gradient, as in
        flash-attn.

    Raises:
        TypeError, ValueError, NotImplementedError: those of `attention_with_kvcache`.
    """
    if _unknown:
        refuse(flash_attn_with_kvcache, _unknown)
    unknown = None
    if alibi_slopes is None and cache_leftpad is None:
        known = attend_known(
            q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx,  # type: ignore[arg-type]
            None,
            None if k is None and v is None else (k, v),
            None if rotary_cos is None and rotary_sin is None else (rotary_cos, rotary_sin),
            None, None, None,
            key_of(
                causal, window_size, softcap, softmax_scale, return_softmax_lse, rotary_interleaved
            ),
            True,
        )  # fmt: skip
        if isinstance(known, Unknown):
            unknown = known
        elif known is not None:
            return known
    return attend_without_gradients(
        q, k_cache, v_cache, k, v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved, lengths=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, page_table=block_table,
        scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, return_lse=return_softmax_lse,
        names=NAMES_WITH_BLOCKS, unknown=unknown,
    )  # fmt: skip


def rows_as_pages(cu_seqlens_k: Tensor, longest: int) -> Tensor:
    """Return the page table of packed keys whose rows are pages of one token: int32,
    [batch, longest]. Entries behind a sequence's own rows are rows of others, or of none.

    Args:
        cu_seqlens_k: int32, [batch + 1]: where each sequence's rows begin.
        longest: a bound on the keys of a sequence.
    """
    places = torch.arange(longest, dtype=torch.int32, device=cu_seqlens_k.device)
    return cu_seqlens_k[:-1, None] + places


def attend_over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    seqused_k: Tensor,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
    out: Tensor | None = None,
    backend: str = "auto",
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute flash_attn_varlen_func over keys and values in pages, or in rows.

    Args:
        q: [total_q, num_heads_q, head_dim]; without cu_seqlens_q [batch, seqlen_q, num_heads_q,
            head_dim].
        k: [num_pages, page_size, num_heads_kv, head_dim]; without block_table [batch, seqlen_k,
            num_heads_kv, head_dim].
        v: likewise, head_dim_v.
        cu_seqlens_q: int32, [batch + 1].
        max_seqlen_q: the longest sequence of queries, or a bound on it.
        seqused_k: int32, [batch]: keys of each sequence.
        block_table: int32, [batch, pages of the longest sequence].
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: aligned at the lower right, by each sequence's lengths.
        window_size: (left, right), -1 for an unbounded side.
        softcap: bound of the scores; 0.0 is off.
        alibi_slopes: None, or those of padded queries.
        return_lse: whether lse is returned too.
        out: receives the result.
        backend: of `attention`.
        sinks: of `attention`.
        k_scale: of 8-bit keys, [batch, num_heads_kv]; None is 1.
        v_scale: likewise, of values.

    Returns:
        out: as q, with head_dim_v; or (out, lse), lse [num_heads_q, total_q].
    """
    unknown = None
    if alibi_slopes is None and (max_seqlen_q is None or type(max_seqlen_q) is int):
        known = attend_known(
            q, k, v, seqused_k, block_table, None, cu_seqlens_q, None, None, sinks,
            scales_given(k, k_scale, v_scale), out,
            key_of(
                causal, window_size, softcap, softmax_scale, return_lse, True, backend,
                max_seqlen_q, "varlen",
            ),
            True,
        )  # fmt: skip
        if isinstance(known, Unknown):
            unknown = known
        elif known is not None:
            return known
    return attend_over_cache(
        q, k, v, None, None, lengths=seqused_k, page_table=block_table, cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q, scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_lse, out=out, backend=backend,
        sinks=sinks, k_scale=k_scale, v_scale=v_scale,
        names=_NAMES_OF_PAGES, unknown=unknown,
    )  # fmt: skip
