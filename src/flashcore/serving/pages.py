"""Find tokens in caches that lie in pages: write new ones, and gather what a sequence has.

A cache is [num_pages, num_heads_kv, page_size, head_dim] with any strides. `page_table`, int32
[batch, pages a sequence], says where token t of sequence b lies: at place t % page_size of page
page_table[b, t // page_size]. A contiguous cache has one page a sequence.

Everything here is arithmetic on the device. Whatever tables and lengths hold, nothing outside of
the cache is read or written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.plain.pages import bits_of, packed_places, places_of, sequences_of, taken
from flashcore.problem.scales import dequantised_rows
from flashcore.serving.rows import Rows, lengths_before


def one_page_each(k_cache: Tensor) -> Tensor:
    """Return the page table of a contiguous cache: sequence b has page b."""
    return torch.arange(k_cache.shape[0], device=k_cache.device, dtype=torch.int32)[:, None]


def capacity_of(k_cache: Tensor, page_table: Tensor | None) -> int:
    """Return how many tokens a sequence has room for."""
    return k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])


def write(
    caches: tuple[Tensor, Tensor],
    page_table: Tensor | None,
    seqlens_k: Tensor,
    new: tuple[Tensor, Tensor],
    rows: Rows,
) -> None:
    """Write new tokens into both caches, in place, behind the last of each sequence.

    A token without room, or whose entry of the table is no page, is dropped.

    Args:
        caches: of keys and of values.
        page_table: int32, [batch, pages a sequence], or None for one page a sequence.
        seqlens_k: int32, [batch]: how many tokens each sequence has.
        new: keys and values, [batch, num_heads_kv, seqlen_new, head_dim] or [total_new,
            num_heads_kv, head_dim].
        rows: of these.
    """
    num_pages, page_size = caches[0].shape[0], caches[0].shape[2]
    table = one_page_each(caches[0]) if page_table is None else page_table
    if 0 in new[0].shape or 0 in table.shape or num_pages == 0 or page_size == 0:
        return
    capacity = capacity_of(caches[0], table)
    place = lengths_before(seqlens_k, capacity)[rows.sequence] + rows.token
    column = (place // page_size).clamp(max=table.shape[1] - 1)
    page = table[rows.sequence, column].long()
    fits = (place < capacity) & (page >= 0) & (page < num_pages)
    if rows.is_any is not None:
        fits = fits & rows.is_any
    page, place, fits = (x.flatten() for x in (page, place % page_size, fits))
    k_new, v_new = (x if x.dim() == 3 else x.transpose(1, 2).flatten(0, 1) for x in new)
    _write_rows(caches, page, place, fits, (k_new, v_new))


def write_at(caches: tuple[Tensor, Tensor], slots: Tensor, new: tuple[Tensor, Tensor]) -> None:
    """Write new tokens into both caches, in place, each where its slot says.

    Args:
        caches: of keys and of values.
        slots: int32 or int64, [total_new]: page * page_size + place of each; a token whose slot is
            none of the cache's is dropped.
        new: keys and values, [total_new, num_heads_kv, head_dim].
    """
    num_pages, page_size = caches[0].shape[0], caches[0].shape[2]
    if 0 in new[0].shape or num_pages == 0 or page_size == 0:
        return
    slots = slots.long()
    fits = (slots >= 0) & (slots < num_pages * page_size)
    _write_rows(caches, slots // page_size, slots % page_size, fits, new)


def _write_rows(
    caches: tuple[Tensor, Tensor],
    page: Tensor,
    place: Tensor,
    fits: Tensor,
    new: tuple[Tensor, Tensor],
) -> None:
    """Write rows [total, num_heads_kv, dim] to places of pages, but for those that do not fit."""
    # The number of tokens that fit is the device's secret, so all rows are written: one that does
    # not fit writes what the first that fits does, or, if none fits, what is there already.
    row = torch.arange(fits.shape[0], device=fits.device)
    source = torch.where(fits, row, fits.int().argmax())
    page, place = page[source].clamp(0, caches[0].shape[0] - 1), place[source]
    for cache, x in zip(map(bits_of, caches), map(bits_of, new), strict=True):
        target = cache.transpose(1, 2)
        values = torch.where(fits.any(), x[source], target[page, place])
        target.index_put_((page, place), values)


def gather_padded(cache: Tensor, page_table: Tensor, leftpad: Tensor | None) -> Tensor:
    """Return a copy of a cache as [batch, num_heads_kv, capacity, dim], each sequence from its
    first token on.

    Args:
        cache: [num_pages, num_heads_kv, page_size, dim].
        page_table: int32, [batch, pages a sequence].
        leftpad: int32, [batch]: the place of each sequence's first token; None is 0.
    """
    batch, capacity = page_table.shape[0], capacity_of(cache, page_table)
    place = torch.arange(capacity, device=cache.device)[None]
    if leftpad is not None:
        place = place + leftpad.long().clamp(0, capacity)[:, None]
    sequence = torch.arange(batch, device=cache.device)[:, None]
    return taken(cache, *places_of(page_table, cache, sequence, place)).transpose(1, 2)


def gather_packed(
    caches: tuple[Tensor, Tensor],
    page_table: Tensor,
    leftpad: Tensor | None,
    lengths: Tensor,
    dtype: torch.dtype,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return copies of the tokens of both caches, one sequence after the other.

    Args:
        caches: of keys and of values.
        page_table: int32, [batch, pages a sequence].
        leftpad: int32, [batch]: the place of each sequence's first token; None is 0.
        lengths: int32, [batch]: tokens of each sequence, from 0 to what it has room for.
        dtype: of the copies.
        scales: of caches of 8 bits, broadcastable to [batch, num_heads_kv].

    Returns:
        k: [batch * capacity, num_heads_kv, head_dim]; rows behind the last sequence hold anything.
        v: [batch * capacity, num_heads_kv, head_dim_v].
        cu_seqlens_k: int32, [batch + 1].
    """
    page, place, cu_seqlens_k = packed_places(page_table, caches[0], lengths, leftpad)
    sequence = sequences_of(page, cu_seqlens_k)
    k, v = (
        dequantised_rows(taken(x, page, place), scale, sequence, dtype)
        for x, scale in zip(caches, scales, strict=True)
    )
    return k, v, cu_seqlens_k
