"""This module has flash-attn 2's functions on flashcore: `from flashcore.compat.flash_attn import
flash_attn_func`.

Signatures and layouts are those of the package flash-attn, 2.6 to 2.8: [batch, seqlen, num_heads,
head_dim], or [total, num_heads, head_dim] for sequences packed one after the other; causal masks
and windows are aligned at the lower right. Besides:

- dropout_p > 0 raises NotImplementedError;
- alibi_slopes becomes an additive float32 mask, which takes [batch or 1, num_heads, seqlen_q,
  seqlen_k] of memory; the varlen functions compute one sequence after another then, and warn;
- `deterministic` is accepted: the forward gives the same bits on every run, whatever it says, and
  so does the backward by our kernels, for False, flash-attn's default, is what callers pass who ask
  for nothing (with that of `flashcore.attention` it may add up dq in any order);
- with return_attn_probs, the log-sum-exp of a row with nothing to attend to is -inf, where
  flash-attn has +inf, and the third value is None, where flash-attn has debugging output;
- `flash_attn_func` and `flash_attn_varlen_func` take `learnable_sink` as flash-attn 4 does, and
  `s_aux`, as builds of flash-attn 3 call it: the sinks of `flashcore.attention`;
- CPU tensors, float32 and float64 work as in `flashcore.attention`.
"""

from __future__ import annotations

import torch

from flashcore.api import attention
from flashcore.backends.packed import check_lengths
from flashcore.dropins.alibi import alibi_mask, check_slopes, packed_with_alibi
from flashcore.dropins.flash_arguments import (
    cap_of,
    check_rows,
    named,
    names_of,
    refuse_dropout,
    renamed,
    sinks_of,
    unpacked,
    window_of,
)
from flashcore.dropins.flash_kvcache import attend_over_pages, flash_attn_with_kvcache
from flashcore.dropins.rows_first import rows_first
from flashcore.ops.varlen import attention_varlen
from flashcore.problem.spelling import OF_FLASH_ATTN, other_names, refuse

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]


@other_names(OF_FLASH_ATTN)
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **_unknown: object,
) -> Result:
    """Compute what flash_attn.flash_attn_func does.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim], read in place.
        k: [batch, seqlen_k, num_heads_kv, head_dim]; num_heads_q a multiple of num_heads_kv.
        v: [batch, seqlen_k, num_heads_kv, head_dim_v].
        dropout_p: 0.
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        window_size: (left, right) keys around that one; -1 is unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        alibi_slopes: [num_heads_q] or [batch, num_heads_q], float32: the score of query i and key j
            gets -slope * abs(i + seqlen_k - seqlen_q - j).
        deterministic: accepted, without effect.
        return_attn_probs: also return the log-sum-exp of the scores, and None.
        learnable_sink: [num_heads_q], the sinks of `attention`.
        s_aux: the same by another name.

    Returns:
        out: [batch, seqlen_q, num_heads_q, head_dim_v], contiguous. With return_attn_probs the
        triple (out, lse, None), lse float32 [batch, num_heads_q, seqlen_q].

    Raises:
        NotImplementedError: dropout_p is not 0; an unsupported head_dim.
        TypeError: as in `attention`; learnable_sink and s_aux together.
        ValueError: as in `attention`; alibi_slopes of another shape.

    Source:
        The interface of flash-attn 2, https://github.com/Dao-AILab/flash-attention.
    """
    if _unknown:
        refuse(flash_attn_func, _unknown)
    refuse_dropout(dropout_p)
    sinks = sinks_of(learnable_sink, s_aux)
    try:
        if alibi_slopes is None and sinks is None:
            known = rows_first(
                q, k, v, causal, window_size, softcap, softmax_scale, return_attn_probs
            )
            if known is not None:
                return (*known, None) if isinstance(known, tuple) else known
        mask = None
        check_rows("[batch, seqlen, num_heads, head_dim]", q=q, k=k, v=v)
        if alibi_slopes is not None:
            check_slopes(alibi_slopes, q, q.shape[0], q.shape[2])
            mask = alibi_mask(alibi_slopes, q.shape[1], k.shape[1])
        heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        result = attention(
            *heads_first, causal=causal, scale=softmax_scale, window=window_of(window_size),
            softcap=cap_of(softcap), mask=mask, sinks=sinks, return_lse=return_attn_probs,
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        raise renamed(error, names_of(s_aux)) from None
    if isinstance(result, tuple):
        out, lse = result
        return out.transpose(1, 2).contiguous(), lse, None
    return result.transpose(1, 2).contiguous()


@other_names(OF_FLASH_ATTN)
def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **_unknown: object,
) -> Result:
    """Compute what flash_attn.flash_attn_qkvpacked_func does: `flash_attn_func` on one tensor.

    qkv is [batch, seqlen, 3, num_heads, head_dim]: q, k and v, read in place. The other arguments,
    the result and the errors are those of `flash_attn_func`; a wrong shape raises ValueError.
    """
    if _unknown:
        refuse(flash_attn_qkvpacked_func, _unknown)
    q, k, v = unpacked("qkv", qkv, 3, "[batch, seqlen, 3, num_heads, head_dim]")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


@other_names(OF_FLASH_ATTN)
def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **_unknown: object,
) -> Result:
    """Compute what flash_attn.flash_attn_kvpacked_func does: `flash_attn_func` with k and v in one
    tensor.

    kv is [batch, seqlen_k, 2, num_heads_kv, head_dim]: k and v, read in place. The other arguments,
    the result and the errors are those of `flash_attn_func`; a wrong shape raises ValueError.
    """
    if _unknown:
        refuse(flash_attn_kvpacked_func, _unknown)
    k, v = unpacked("kv", kv, 2, "[batch, seqlen, 2, num_heads_kv, head_dim]")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


@other_names(OF_FLASH_ATTN)
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    learnable_sink: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **_unknown: object,
) -> Result:
    """Compute what flash_attn.flash_attn_varlen_func does: attention of sequences packed one after
    the other.

    Args:
        q: [total_q, num_heads_q, head_dim], read in place.
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32 [batch + 1]: 0, then where each sequence of queries ends.
        cu_seqlens_k: int32 [batch + 1]: 0, then where each sequence of keys ends.
        max_seqlen_q: the longest sequence of queries; an int or a tensor, as in
            `attention_varlen`.
        max_seqlen_k: the longest sequence of keys; an int or a tensor.
        dropout_p: 0.0; there is no dropout.
        softmax_scale: the factor of q.k; None is 1 / sqrt(head_dim).
        causal: aligned at the lower right, for each sequence by its own lengths.
        window_size: (left, right), -1 for an unbounded side; by each sequence's lengths.
        softcap: bound of the scores; 0.0 is off.
        alibi_slopes: [num_heads_q] or [batch, num_heads_q], by each sequence's own lengths. With
            a FallbackWarning: the host reads the lengths, and each sequence is a call of its own.
        deterministic: without effect; the forward pass always is.
        return_attn_probs: also return lse, and None in place of the probabilities.
        block_table: int32, [batch, pages]: k and v are [num_pages, page_size, num_heads_kv,
            head_dim], as in `flash_attn_with_kvcache`, and have no gradients.
        learnable_sink: [num_heads_q], the sinks of `attention_varlen`.
        s_aux: the same by another name.

    Returns:
        out: [total_q, num_heads_q, head_dim_v]. With return_attn_probs the triple (out, lse, None),
        lse float32 [num_heads_q, total_q].

    Raises:
        NotImplementedError: dropout_p is given; alibi_slopes together with block_table.
        TypeError, ValueError: those of `attention_varlen`.
    """
    if _unknown:
        refuse(flash_attn_varlen_func, _unknown)
    refuse_dropout(dropout_p)
    sinks = sinks_of(learnable_sink, s_aux)
    if block_table is not None:
        check_lengths("cu_seqlens_k", cu_seqlens_k, q)
        lengths = cu_seqlens_k.diff()
        found = attend_over_pages(
            q, k, v, cu_seqlens_q, max_seqlen_q, lengths, block_table, softmax_scale, causal,
            window_size, softcap, alibi_slopes, return_attn_probs, sinks=sinks,
        )  # fmt: skip
        return (*found, None) if isinstance(found, tuple) else found
    options = {
        "causal": causal, "scale": softmax_scale, "window": window_of(window_size),
        "softcap": cap_of(softcap), "sinks": sinks,
    }  # fmt: skip
    packed = q, k, v, cu_seqlens_q, cu_seqlens_k
    if alibi_slopes is not None:
        out, lse = named(names_of(s_aux), packed_with_alibi, *packed, alibi_slopes, **options)
        return (out, lse, None) if return_attn_probs else out
    result = named(
        names_of(s_aux), attention_varlen, *packed, max_seqlen_q, max_seqlen_k, **options,
        return_lse=return_attn_probs,
    )  # fmt: skip
    return (*result, None) if isinstance(result, tuple) else result


@other_names(OF_FLASH_ATTN)
def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **_unknown: object,
) -> Result:
    """Compute what flash_attn.flash_attn_varlen_qkvpacked_func does: `flash_attn_varlen_func` on
    one tensor.

    qkv is [total, 3, num_heads, head_dim], cu_seqlens and max_seqlen hold for queries and keys. The
    other arguments, the result and the errors are those of `flash_attn_varlen_func`.
    """
    if _unknown:
        refuse(flash_attn_varlen_qkvpacked_func, _unknown)
    q, k, v = unpacked("qkv", qkv, 3, "[total, 3, num_heads, head_dim]")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@other_names(OF_FLASH_ATTN)
def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **_unknown: object,
) -> Result:
    """Compute what flash_attn.flash_attn_varlen_kvpacked_func does: `flash_attn_varlen_func`, k and
    v in one tensor.

    kv is [total_k, 2, num_heads_kv, head_dim]. The other arguments, the result and the errors are
    those of `flash_attn_varlen_func`.
    """
    if _unknown:
        refuse(flash_attn_varlen_kvpacked_func, _unknown)
    k, v = unpacked("kv", kv, 2, "[total, 2, num_heads_kv, head_dim]")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
