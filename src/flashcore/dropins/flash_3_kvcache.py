"""Compute flash-attn 3's functions for decoders with a cache; flashcore.compat.flash_attn_3 has
them."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.dropins.flash_arguments import refuse_unsupported, unless
from flashcore.dropins.flash_over_cache import (
    CACHE_NAMES,
    NAMES_WITH_BLOCKS,
    attend_without_gradients,
    key_of,
    scales_given,
)
from flashcore.problem.spelling import OF_FLASH_ATTN_CACHE, other_names, refuse
from flashcore.serving.known_steps import Unknown, attend_known


@other_names(OF_FLASH_ATTN_CACHE)
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_unknown: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what flash_attn_interface.flash_attn_with_kvcache does: append k and v to the caches,
    in place, and attend to all that is there.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim]; with cu_seqlens_q [total_q, num_heads_q,
            head_dim].
        k_cache: [batch_cache, seqlen_cache, num_heads_kv, head_dim]; with page_table
            [num_pages, page_size, num_heads_kv, head_dim]. Read and written in place.
        v_cache: likewise, with head_dim_v.
        k: [batch, seqlen_new, num_heads_kv, head_dim]; with cu_seqlens_q [total_new, num_heads_kv,
            head_dim]; None: the caches have all.
        v: likewise, with head_dim_v.
        qv: None.
        rotary_cos: [positions, rotary_dim / 2]: rotates k at cache_seqlens, cache_seqlens + 1 ...;
            q too with causal or a window, else all of q at cache_seqlens. It needs k.
        rotary_sin: likewise.
        cache_seqlens: int32, [batch], or an int for all: tokens in the cache before the call; by
            default it is full.
        cache_batch_idx: int32, [batch]: the row of the cache of each sequence.
        cache_leftpad: int32, [batch]: where each sequence begins in its row.
        page_table: int32, [batch, pages of the longest sequence]; pages of any size.
        cu_seqlens_q: int32, [batch + 1]: where packed sequences of queries end.
        cu_seqlens_k_new: int32, [batch + 1]: where packed sequences of k and v end; by default
            cu_seqlens_q.
        max_seqlen_q: the longest sequence of packed queries, or a bound on it.
        rotary_seqlens: int32, [batch]: rotates from these positions on, not from cache_seqlens.
        q_descale: without effect, as q has 16 bits.
        k_descale: float32, [batch, num_heads_kv], of a k_cache of float8_e4m3fn: an element counts
            times it, k is divided by it; None is 1. Without effect on caches of 16 bits.
        v_descale: likewise, of v_cache.
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: query i sees keys up to i + seqlen_k - seqlen_q, by each sequence's own length.
        window_size: (left, right) keys around that one; -1 is unbounded.
        attention_chunk: 0.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        rotary_interleaved: elements 0 and 1, 2 and 3 ... are pairs; False: 0 and rotary_dim / 2 ...
        scheduler_metadata: without effect.
        num_splits: without effect.
        pack_gqa: without effect.
        sm_margin: without effect.
        return_softmax_lse: also return the log-sum-exp of the scores.
        block_table: another name of page_table.
        out: receives the result: its shape, dtype and device.
        s_aux: [num_heads_q], the sinks of `attention`.

    Returns:
        out: [batch, seqlen_q, num_heads_q, head_dim_v] or [total_q, num_heads_q, head_dim_v]; the
        tensor given as out, if any. With return_softmax_lse the pair (out, lse), lse float32
        [batch, num_heads_q, seqlen_q] or [num_heads_q, total_q]. Neither has a gradient.

    Raises:
        NotImplementedError: qv or attention_chunk is given.
        TypeError, ValueError: those of `attention_with_kvcache`.
    """
    if _unknown:
        refuse(flash_attn_with_kvcache, _unknown)
    if qv is not None or type(attention_chunk) is not int or attention_chunk:
        refuse_unsupported(qv=qv, attention_chunk=unless(0, attention_chunk))
    table, unknown = page_table if block_table is None else block_table, None
    if (
        cache_leftpad is None
        and rotary_seqlens is None
        and cu_seqlens_k_new is None
        and (max_seqlen_q is None or type(max_seqlen_q) is int)
    ):
        known = attend_known(
            q, k_cache, v_cache, cache_seqlens, table, cache_batch_idx,  # type: ignore[arg-type]
            cu_seqlens_q,
            None if k is None and v is None else (k, v),
            None if rotary_cos is None and rotary_sin is None else (rotary_cos, rotary_sin),
            s_aux, scales_given(k_cache, k_descale, v_descale), out,
            key_of(
                causal, window_size, softcap, softmax_scale, return_softmax_lse,
                rotary_interleaved, max_seqlen_q,
            ),
            True,
        )  # fmt: skip
        if isinstance(known, Unknown):
            unknown = known
        elif known is not None:
            return known
    return attend_without_gradients(
        q, k_cache, v_cache, k, v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved, rotary_seqlens=rotary_seqlens,
        lengths=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        page_table=table, cu_seqlens_q=cu_seqlens_q, cu_seqlens_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q, scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, return_lse=return_softmax_lse, out=out, sinks=s_aux, k_scale=k_descale,
        v_scale=v_descale, names=CACHE_NAMES if block_table is None else NAMES_WITH_BLOCKS,
        unknown=unknown,
    )  # fmt: skip


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """Return an empty tensor, which may be passed on as scheduler_metadata: calls here are
    scheduled when they run, by the lengths on the device.

    Args:
        batch_size: sequences; like all that follows but cache_seqlens, it has no effect.
        max_seqlen_q: the longest sequence of queries.
        max_seqlen_k: the longest sequence of keys.
        num_heads_q: of q.
        num_heads_kv: of the caches.
        headdim: of q and k.
        cache_seqlens: int32, [batch]: its device is that of the result.
        qkv_dtype: of all.
        headdim_v: of v.
        cu_seqlens_q: where packed sequences of queries end.
        cu_seqlens_k_new: where packed sequences of new tokens end.
        cache_leftpad: where each sequence begins in its row.
        page_size: tokens of a page.
        max_seqlen_k_new: the longest sequence of new tokens.
        causal: whether a causal mask follows.
        window_size: of the calls to come.
        attention_chunk: of the calls to come.
        has_softcap: whether soft-capping follows.
        num_splits: of the calls to come.
        pack_gqa: of the calls to come.
        sm_margin: of the calls to come.

    Returns:
        int32, [0].
    """
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)
