"""Write new keys and values into caches, and rotate queries and keys; as an operator of torch,
`flashcore::append_to_kvcache`, which says that it changes the caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.serving.pages import capacity_of, write
from flashcore.serving.rotary import Rotary
from flashcore.serving.rows import Rows, lengths_after, lengths_before, number_of

_LIBRARY = torch.library.Library("flashcore", "FRAGMENT")
_LIBRARY.define(
    "append_to_kvcache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor q, Tensor k_new, "
    "Tensor v_new, Tensor seqlens_k, Tensor? page_table, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_new, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
    "Tensor? rotary_offsets, Tensor? rotary_positions, str rotary_queries) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    seqlens_k: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_new: Tensor | None,
    rotary: Rotary | None,
) -> tuple[Tensor, Tensor]:
    """Write new tokens into the caches, in place; rotate the new keys before, and the queries.

    Args:
        k_cache: [num_pages, num_heads_kv, page_size, head_dim]; changed.
        v_cache: [num_pages, num_heads_kv, page_size, head_dim_v]; changed.
        q: [batch, num_heads_q, seqlen_q, head_dim] or [total_q, num_heads_q, head_dim].
        k_new: [batch, num_heads_kv, seqlen_new, head_dim] or [total_new, num_heads_kv, head_dim].
        v_new: likewise, head_dim_v.
        seqlens_k: int32, [batch]: tokens in the cache before.
        page_table: int32, [batch, pages a sequence]; None: sequence b has page b.
        cu_seqlens_q: int32, [batch + 1], where q is packed.
        cu_seqlens_new: int32, [batch + 1], where k_new and v_new are packed.
        rotary: what rotates; None for nothing.

    Returns:
        q: rotated.
        seqlens_k: int32, [batch]: tokens in the cache now.
    """
    asked = (None, None, False, None, None, "") if rotary is None else rotary
    rotated, lengths = torch.ops.flashcore.append_to_kvcache(
        k_cache, v_cache, q, k_new, v_new, seqlens_k, page_table, cu_seqlens_q, cu_seqlens_new,
        *asked,
    )  # fmt: skip
    return q if rotary is None else rotated, lengths


def rotated_queries(
    q: Tensor,
    before: Tensor,
    cu_seqlens_q: Tensor | None,
    rotary: Rotary,
    number_new: Tensor | int,
) -> Tensor:
    """Return the queries rotated.

    Args:
        q: as `append` takes it.
        before: int32, [batch]: tokens in the cache, from 0 to what it has room for.
        cu_seqlens_q: as `append` takes it.
        rotary: what rotates.
        number_new: how many new tokens each sequence has.
    """
    if 0 in q.shape or before.shape[0] == 0:
        return q.clone()
    rows, ahead = Rows.of(q, cu_seqlens_q), number_new - number_of(q, cu_seqlens_q)
    if rotary.queries != "end":
        ahead = 0
    if rotary.queries == "first":
        rows = rows._replace(token=torch.zeros_like(rows.token))
    return rotary.rotate(q, rotary.positions_of(rows, before, ahead))


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    seqlens_k: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    *asked: Any,
) -> tuple[Tensor, Tensor]:
    capacity = capacity_of(k_cache, page_table)
    before, number_new = lengths_before(seqlens_k, capacity), number_of(k_new, cu_seqlens_new)
    rotated = q.new_empty(0)
    has_rows = 0 not in k_new.shape and before.shape[0] > 0
    rows = Rows.of(k_new, cu_seqlens_new) if has_rows else None
    if rotary_cos is not None and rotary_sin is not None:
        rotary = Rotary(rotary_cos, rotary_sin, *asked)
        rotated = rotated_queries(q, before, cu_seqlens_q, rotary, number_new)
        if rows is not None:
            k_new = rotary.rotate(k_new, rotary.positions_of(rows, before))
    if rows is not None:
        write((k_cache, v_cache), page_table, before, (k_new, v_new), rows)
    return rotated.contiguous(), lengths_after(seqlens_k, capacity, number_new)


def _fake(k_cache: Tensor, v_cache: Tensor, q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rotated = q.new_empty(0 if others[6] is None else q.shape)
    return rotated, torch.empty_like(others[2])


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("append_to_kvcache", _append, _device)
torch.library.register_fake("flashcore::append_to_kvcache", _fake, lib=_LIBRARY)
