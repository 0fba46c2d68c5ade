"""Attend to sequences packed into one row, as padding-free training with Transformers describes
them."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.ops.varlen import attention_varlen

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def packed_lengths(
    kwargs: dict[str, Any],
    query: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    position_bias: torch.Tensor | None,
) -> tuple[Any, ...] | None:
    """Return the lengths of packed sequences.

    Args:
        kwargs: of the attention interface, see PACKED.
        query: [1, num_heads_q, seqlen_q, head_dim].
        mask: as the interface gets it.
        dropout: as the interface gets it.
        position_bias: as the interface gets it.

    Returns:
        What `attention_varlen` takes after q, k and v; None where nothing is packed.

    Raises:
        NotImplementedError: some of the four arguments are missing, or they come with several rows,
            a mask of two dimensions, dropout or a position bias.
    """
    given = [name for name in PACKED if kwargs.get(name) is not None]
    if not given:
        return None
    names = ", ".join(given)
    if len(given) < len(PACKED):
        missing = ", ".join(name for name in PACKED if name not in given)
        raise NotImplementedError(f"{names} without {missing}; pass all four, or none")
    if query.shape[0] != 1:
        raise NotImplementedError(
            f"{names} with batch {query.shape[0]}; pack all sequences into one row"
        )
    if mask is not None and mask.dim() == 2:
        raise NotImplementedError(
            f"{names} with an attention_mask that hides padding; pack without padding, or leave "
            "them out"
        )
    if mask is None and (dropout or position_bias is not None):
        what = f"dropout={dropout}" if dropout else "position_bias"
        raise NotImplementedError(
            f"{names} with {what}; pass position_ids that start over, of which Transformers makes "
            "a mask, or attn_implementation='eager'"
        )
    device = query.device
    ends = [kwargs[name].to(device=device, dtype=torch.int32) for name in PACKED[:2]]
    return *ends, kwargs["max_length_q"], kwargs["max_length_k"]


def same_sequence(packed: tuple[Any, ...], query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return [1, 1, seqlen_q, seqlen_k], True where a query's sequence is the key's."""
    rows, cols = (
        torch.bucketize(torch.arange(x.shape[2], device=x.device), ends, right=True)
        for x, ends in ((query, packed[0]), (key, packed[1]))
    )
    return (rows[:, None] == cols)[None, None]


def attention_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: tuple[Any, ...],
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `attention_varlen` of rows that look as for `attention`.

    Args:
        query: [1, num_heads_q, seqlen_q, head_dim].
        key: [1, num_heads_kv, seqlen_k, head_dim].
        value: [1, num_heads_kv, seqlen_k, head_dim_v].
        packed: from `packed_lengths`.
        **options: of `attention_varlen`.

    Returns:
        out, [1, num_heads_q, seqlen_q, head_dim_v], a view of [seqlen_q, num_heads_q, head_dim_v];
        with return_lse, and lse, [1, num_heads_q, seqlen_q].
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    result = attention_varlen(q, k, v, *packed, **options)
    if isinstance(result, tuple):
        return result[0].transpose(0, 1)[None], result[1][None]
    return result.transpose(0, 1)[None]
