"""Compute aten's flash operators over caches: keys in pages, or of which a part is used."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.serving.with_kvcache import with_kvcache


def rows_as_pages(cu_seqlens_k: Tensor, longest: int) -> Tensor:
    """Return the page table of packed keys whose rows are pages of one token: int32,
    [batch, longest]. Entries behind a sequence's own rows are rows of others, or of none.

    Args:
        cu_seqlens_k: int32, [batch + 1]: where each sequence's rows begin.
        longest: a bound on the keys of a sequence.
    """
    places = torch.arange(longest, dtype=torch.int32, device=cu_seqlens_k.device)
    return cu_seqlens_k[:-1, None] + places


def is_over_pages(
    cum_seq_q: Tensor | None, seqused_k: Tensor | None, block_table: Tensor | None
) -> bool:
    """Return whether packed queries go over keys in pages, or over the first of packed keys."""
    return cum_seq_q is not None and (seqused_k is not None or block_table is not None)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of packed queries.

    Args:
        query: [total_q, num_heads_q, head_dim].
        key: [num_pages, page_size, num_heads_kv, head_dim]; without block_table [total_k,
            num_heads_kv, head_dim].
        value: likewise.
        cum_seq_q: int32, [batch + 1].
        cum_seq_k: int32, [batch + 1]; needed without block_table, or without seqused_k.
        max_q: the longest sequence of queries, or a bound on it.
        max_k: the longest sequence of keys, or a bound on it.
        seqused_k: int32, [batch]: keys of each sequence; by default those of cum_seq_k.
        block_table: int32, [batch, pages of the longest sequence].
        causal: aligned at the lower right.
        window: (left, right), or None.
        scale: of the scores, or None.
        backend: of `attention`.
    """
    if seqused_k is None:
        assert cum_seq_k is not None
        seqused_k = cum_seq_k.diff()
    if block_table is None:
        assert cum_seq_k is not None
        block_table = rows_as_pages(cum_seq_k, min(max_k, key.shape[0]))
        key, value = key.unsqueeze(1), value.unsqueeze(1)
    options = {"causal": causal, "window": window, "scale": scale, "softcap": None}
    with torch.no_grad():
        result = with_kvcache(
            query, key.transpose(1, 2), value.transpose(1, 2), None, None, seqused_k, block_table,
            None, None, cum_seq_q, None, max_q, None, None, None, True, None, None, backend,
            options,
        )  # fmt: skip
    assert isinstance(result, tuple)
    return result
