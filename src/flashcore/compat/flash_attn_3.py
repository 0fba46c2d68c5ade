"""This module has flash-attn 3's functions on flashcore: `from flashcore.compat.flash_attn_3 import
flash_attn_with_kvcache`.

Signatures and layouts are those of hopper/flash_attn_interface.py, whatever the GPU. After its own
arguments the packed function takes, by keyword, those that vLLM's copy has (block_table, out ...).
Besides:

- qv, attention_chunk and seqused_q raise NotImplementedError, and so does a q of float8; keys and
  values of float8_e4m3fn are read from a cache, with k_descale and v_descale, for a q of 16 bits;
- descales have no effect on 16-bit tensors, as in flash-attn 3;
- num_splits, pack_gqa, sm_margin and scheduler_metadata are hints about speed, without effect here;
- a result of (out, lse) has two entries, where flash-attn 3 may append its buffers;
- the log-sum-exp of a row with nothing to attend to is -inf;
- CPU tensors, float32 and float64 work as in `flashcore.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.backends.packed import checked_max_seqlen
from flashcore.compat import flash_attn
from flashcore.dropins.flash_3_kvcache import flash_attn_with_kvcache, get_scheduler_metadata
from flashcore.dropins.flash_arguments import refuse_dropout, refuse_unsupported, unless
from flashcore.dropins.flash_kvcache import attend_over_pages, rows_as_pages
from flashcore.problem.spelling import OF_FLASH_ATTN, other_names, refuse
from flashcore.serving.checking import check_plain

__all__ = [
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

Result = Tensor | tuple[Tensor, Tensor]
Window = tuple[int, int]


@other_names(OF_FLASH_ATTN)
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    **_unknown: object,
) -> Result:
    """Compute what flash_attn_interface.flash_attn_func does, gradients included.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim], read in place.
        k: [batch, seqlen_k, num_heads_kv, head_dim].
        v: [batch, seqlen_k, num_heads_kv, head_dim_v].
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        qv: None.
        q_descale: without effect, like the two that follow.
        k_descale: see q_descale.
        v_descale: see q_descale.
        window_size: (left, right) keys around that one; -1 is unbounded.
        attention_chunk: 0.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        num_splits: without effect.
        pack_gqa: without effect.
        deterministic: without effect.
        sm_margin: without effect.
        return_attn_probs: also return the log-sum-exp of the scores.
        s_aux: [num_heads_q], the sinks of `attention`.

    Returns:
        out: [batch, seqlen_q, num_heads_q, head_dim_v], contiguous. With return_attn_probs the pair
        (out, lse), lse float32 [batch, num_heads_q, seqlen_q].

    Raises:
        NotImplementedError: qv or attention_chunk is given.
        TypeError, ValueError: as `attention`.
    """
    if _unknown:
        refuse(flash_attn_func, _unknown)
    refuse_unsupported(qv=qv, attention_chunk=unless(0, attention_chunk))
    result = flash_attn.flash_attn_func(
        q, k, v, 0.0, softmax_scale, causal, window_size, softcap, None, deterministic,
        return_attn_probs, s_aux=s_aux,
    )  # fmt: skip
    return result[:2] if isinstance(result, tuple) else result


@other_names(OF_FLASH_ATTN)
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window | None = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    block_table: Tensor | None = None,
    page_table: Tensor | None = None,
    out: Tensor | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_softmax_lse: bool = False,
    scheduler_metadata: Tensor | None = None,
    q_v: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    fa_version: int | None = None,
    **_unknown: object,
) -> Result:
    """Compute what flash_attn_interface.flash_attn_varlen_func does: packed queries over packed
    keys, with gradients, or over a cache, without.

    Args:
        q: [total_q, num_heads_q, head_dim]; without cu_seqlens_q [batch, seqlen_q, num_heads_q,
            head_dim].
        k: [total_k, num_heads_kv, head_dim]; without cu_seqlens_k [batch, seqlen_k, num_heads_kv,
            head_dim]; with a table [num_pages, page_size, num_heads_kv, head_dim].
        v: likewise, with head_dim_v.
        cu_seqlens_q: int32, [batch + 1]: 0, then where each sequence of queries ends.
        cu_seqlens_k: int32, [batch + 1]: 0, then where each sequence of keys ends.
        max_seqlen_q: the longest sequence of queries, or a bound on it.
        max_seqlen_k: the longest sequence of keys, or a bound on it.
        seqused_q: None.
        seqused_k: int32, [batch]: how many keys each sequence has, the first of its own.
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: aligned at the lower right, for each sequence by its own lengths.
        qv: None.
        q_descale: without effect, as q has 16 bits.
        k_descale: float32, [batch, num_heads_kv], of a cache k of float8_e4m3fn: an element counts
            times it; None is 1. Without effect on 16-bit keys.
        v_descale: likewise, of v.
        window_size: (left, right), -1 for an unbounded side; None is (-1, -1).
        attention_chunk: 0.
        softcap: bound of the scores; 0.0 is off.
        num_splits: without effect.
        pack_gqa: without effect.
        deterministic: without effect.
        sm_margin: without effect.
        return_attn_probs: also return the log-sum-exp of the scores.
        block_table: int32, [batch, pages of the longest sequence]; needs seqused_k.
        page_table: another name of block_table.
        out: receives the result: its shape, dtype and device.
        s_aux: [num_heads_q], the sinks of `attention`.
        alibi_slopes: as in `flash_attn.flash_attn_varlen_func`; not over a cache.
        dropout_p: 0.0.
        return_softmax_lse: another name of return_attn_probs.
        scheduler_metadata: without effect.
        q_v: None.
        cp_world_size: 1.
        cp_rank: without effect.
        cp_tot_seqused_k: without effect.
        fa_version: without effect.

    Returns:
        out: as q, with head_dim_v; the tensor given as out, if any. With return_attn_probs or
        return_softmax_lse the pair (out, lse), lse float32 [num_heads_q, total_q].

    Raises:
        NotImplementedError: an argument that must be None, 0 or 1 is not.
        TypeError, ValueError: as `attention_varlen` and `attention_with_kvcache`.
    """
    if _unknown:
        refuse(flash_attn_varlen_func, _unknown)
    refuse_dropout(dropout_p)
    refuse_unsupported(
        qv=qv if q_v is None else q_v, attention_chunk=unless(0, attention_chunk),
        seqused_q=seqused_q, cp_world_size=unless(1, cp_world_size),
    )  # fmt: skip
    table = page_table if block_table is None else block_table
    window_size = (-1, -1) if window_size is None else window_size
    return_lse = return_attn_probs or return_softmax_lse
    packed = cu_seqlens_q is not None and cu_seqlens_k is not None
    if packed and table is None and seqused_k is None:
        for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if longest is None:
                raise TypeError(f"{name} is missing; pass the longest sequence or a bound on it")
        compute: Any = flash_attn.flash_attn_varlen_func
        found = compute(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale,
            causal, window_size, softcap, alibi_slopes, deterministic, return_lse, s_aux=s_aux,
        )  # fmt: skip
        return _into(out, found[:2] if isinstance(found, tuple) else found)
    if seqused_k is None:
        if table is not None:
            raise ValueError(
                "block_table is given without seqused_k, which says how many keys each sequence has"
            )
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k is given without cu_seqlens_q; pack both or neither")
        seqused_k = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    if table is None and cu_seqlens_k is not None:
        # Rows of packed keys are pages of one token, one after the other.
        bound = k.shape[0] if max_seqlen_k is None else max_seqlen_k
        table = rows_as_pages(cu_seqlens_k, checked_max_seqlen("max_seqlen_k", bound, k.shape[0]))
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    return attend_over_pages(
        q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, table, softmax_scale, causal, window_size,
        softcap, alibi_slopes, return_lse, out, sinks=s_aux, k_scale=k_descale, v_scale=v_descale,
    )  # fmt: skip


def _into(out: Tensor | None, result: Result) -> Result:
    """Return a result, copied into the memory that is given, if any."""
    if out is None:
        return result
    found, lse = result if isinstance(result, tuple) else (result, None)
    check_plain("out", out)
    if out.shape != found.shape or out.dtype != found.dtype:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}; the result is {found.dtype} {list(found.shape)}"
        )
    out.copy_(found)
    return out if lse is None else (out, lse)
