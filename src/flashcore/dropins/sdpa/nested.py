"""Compute torch's scaled_dot_product_attention of nested tensors: packed sequences for
attention_varlen.

A jagged nested tensor [batch, num_heads, seqlen, head_dim], as models make it by transposing
[batch, seqlen, num_heads, head_dim], is already what attention_varlen reads: all tokens one after
the other, and offsets. Nothing is copied but the offsets, which become int32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flashcore.ops.varlen import attention_varlen

if TYPE_CHECKING:
    from flashcore.dropins.sdpa.call import Arguments


def nested_obstacle(call: Arguments) -> str | None:
    """Return why attention_varlen does not serve a call whose query is nested; None if it does."""
    q, k, v = call.query, call.key, call.value
    if torch.compiler.is_compiling():
        return "nested tensors in compiled code"
    if not all(_is_jagged(x) for x in (q, k, v)):
        return "nested tensors that are not jagged in their third of four dimensions"
    if call.attn_mask is not None:
        return "attn_mask with nested tensors"
    if k.shape[0] != q.shape[0] or k.shape[2] != v.shape[2] or k.shape[1] != v.shape[1]:
        return "nested tensors of different batches"
    if not call.enable_gqa and k.shape[1] != q.shape[1]:
        return "nested tensors of different heads"
    if call.is_causal and q.shape[2] != k.shape[2]:
        return "is_causal with different lengths of query and key in nested tensors"
    return None


def _is_jagged(x: Any) -> bool:
    return bool(
        x.is_nested
        and x.layout == torch.jagged
        and x.dim() == 4
        and x._ragged_idx == 2
        and x.lengths() is None  # else there are holes between the sequences
    )


def packed(x: torch.Tensor) -> torch.Tensor:
    """Return [total, num_heads, head_dim], a view."""
    return x.transpose(1, 2).values()


def attention_nested(call: Arguments, backend: str) -> torch.Tensor:
    """Compute a call that has no `nested_obstacle`.

    Args:
        call: query, key and value [batch, num_heads, jagged seqlen, head_dim].
        backend: as in `attention_varlen`.

    Returns:
        Nested [batch, num_heads_q, jagged seqlen_q, head_dim_v].
    """
    q, k, v = packed(call.query), packed(call.key), packed(call.value)
    like: Any = call.query
    offsets = like.offsets()
    offsets_k: Any = call.key
    out = attention_varlen(
        q,
        k,
        v,
        offsets.to(torch.int32),
        offsets_k.offsets().to(torch.int32),
        _longest(call.query, q),
        _longest(call.key, k),
        causal=call.is_causal,
        scale=call.scale,
        backend=backend,
    )
    nested = torch.nested.nested_tensor_from_jagged(
        out, offsets, min_seqlen=like._maybe_min_seqlen, max_seqlen=like._maybe_max_seqlen
    )
    return nested.transpose(1, 2)


def _longest(x: Any, tokens: torch.Tensor) -> int:
    """Return the longest sequence where it is known; else a bound, for asking would wait for the
    GPU."""
    known = x._maybe_max_seqlen
    return tokens.shape[0] if known is None else int(known)
