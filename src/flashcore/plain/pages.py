"""Gather the keys and values of sequences from the pages of a cache, and add their gradients up
there.

Pages are [num_pages, num_heads_kv, page_size, dim]; entry j of a sequence's row of the page table
is the page of its keys j * page_size to (j + 1) * page_size - 1. Sequences may share pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.plain.lengths import (
    Tensors,
    padded_backward_plain,
    padded_forward_plain,
    padded_second_order,
    varlen_backward_plain,
    varlen_forward_plain,
    varlen_second_order,
)
from flashcore.problem.options import Inputs, Options, Results
from flashcore.problem.scales import dequantised_rows, is_float8


def gathered(pages: Tensor, page_table: Tensor) -> Tensor:
    """Return [batch, num_heads_kv, max_pages * page_size, dim]. Behind a sequence's last page,
    where entries may be anything, it holds some page of the cache."""
    found = bits_of(pages)[_valid(page_table, pages)].transpose(1, 2).flatten(2, 3)
    return with_bits_of(found, pages)


def bits_of(x: Tensor) -> Tensor:
    """Return 8-bit floats as integers, for which there are all operations; others as they are."""
    return x.view(torch.uint8) if is_float8(x) else x


def with_bits_of(x: Tensor, like: Tensor) -> Tensor:
    """Return what `bits_of` made of a tensor's elements as elements again. Others stay as they are,
    as a view by dtype has no derivative in forward mode."""
    return x.view(like.dtype) if is_float8(like) else x


def scattered(gradient: Tensor, pages: Tensor, page_table: Tensor) -> Tensor:
    """Return the gradient of the pages from that of what `gathered` returned, which is 0 behind
    each sequence's last key."""
    shares = gradient.unflatten(2, (page_table.shape[1], pages.shape[2])).transpose(1, 2)
    index = _valid(page_table, pages).flatten()
    return torch.zeros_like(pages).index_add(0, index, shares.flatten(0, 1))


def keys_of_sequence(pages: Tensor, entries: Tensor, num_keys: int) -> Tensor:
    """Return [1, num_heads_kv, num_keys, dim], a sequence's own.

    Args:
        pages: of k or v.
        entries: [max_pages], its row of the page table.
        num_keys: how many it has; entries behind their last page are not read.
    """
    used = entries[: -(-num_keys // pages.shape[2])]
    return gathered(pages, used.unsqueeze(0))[:, :, :num_keys]


def packed_places(
    page_table: Tensor, pages: Tensor, lengths: Tensor, leftpad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the tokens of sequences lie, one sequence after the other: as many rows as there
    is room for, of which those behind the last sequence name any place.

    Args:
        page_table: int32, [batch, max_pages].
        pages: of k or v.
        lengths: int32, [batch]: tokens of each sequence, from 0 to what it has room for.
        leftpad: int32, [batch]: the place of each sequence's first token; None is 0.

    Returns:
        page: int64, [rows]: of the cache.
        place: int64, [rows]: in that page.
        cu_seqlens_k: int32, [batch + 1].
    """
    batch = page_table.shape[0]
    reach = page_table.shape[1] * pages.shape[2]
    cu_seqlens_k = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    row = torch.arange(batch * reach, device=lengths.device)
    if batch * reach == 0:
        return row, row, cu_seqlens_k.int()
    sequence = sequences_of(row, cu_seqlens_k)
    token = row - cu_seqlens_k[sequence]
    if leftpad is not None:
        token = token + leftpad.long()[sequence]
    return *places_of(page_table, pages, sequence, token), cu_seqlens_k.int()


def places_of(
    page_table: Tensor, pages: Tensor, sequence: Tensor, token: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the page of each token of these sequences and its place there; of a token that a
    sequence has no room for, or whose entry of the table is no page, those of another."""
    page_size = pages.shape[2]
    token = token.clamp(0, page_table.shape[1] * page_size - 1)
    return _valid(page_table, pages)[sequence, token // page_size], token % page_size


def sequences_of(rows: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """Return the sequence of each of so many packed rows, int64; the last one's of those behind."""
    row = torch.arange(rows.shape[0], device=rows.device)
    found = torch.searchsorted(cu_seqlens_k[1:].contiguous(), row, right=True)
    return found.clamp(max=max(0, cu_seqlens_k.shape[0] - 2))


def packed_inputs(inputs: Inputs) -> tuple[Inputs, Tensor, Tensor]:
    """Return the call of packed sequences that a call with packed queries and pages amounts to; and
    where its keys lie, as `packed_places` does."""
    table, seqlens_k = inputs.page_table, inputs.seqlens_k
    assert table is not None
    assert seqlens_k is not None
    reach = table.shape[1] * inputs.k.shape[2]
    page, place, cu_seqlens_k = packed_places(table, inputs.k, seqlens_k.clamp(0, reach))
    sequence, pairs = None, ((inputs.k, inputs.k_scale), (inputs.v, inputs.v_scale))
    if inputs.k_scale is not None:
        sequence = sequences_of(page, cu_seqlens_k)
    k, v = (
        dequantised_rows(taken(x, page, place), scale, sequence, inputs.q.dtype)
        for x, scale in pairs
    )
    packed = inputs._replace(
        k=k, v=v, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=reach, page_table=None, seqlens_k=None,
        k_scale=None, v_scale=None,
    )  # fmt: skip
    return packed, page, place


def taken(pages: Tensor, page: Tensor, place: Tensor) -> Tensor:
    """Return [..., num_heads_kv, dim]: the tokens at these places of these pages."""
    if page.numel() == 0 or pages.shape[0] == 0:
        return pages.new_zeros((*page.shape, pages.shape[1], pages.shape[3]))
    return with_bits_of(bits_of(pages).transpose(1, 2)[page, place], pages)


def put_back(gradient: Tensor, pages: Tensor, page: Tensor, place: Tensor) -> Tensor:
    """Return the gradient of the pages from that of what `taken` returned."""
    whole = torch.zeros_like(pages)
    if page.shape[0] and pages.shape[0]:
        whole.transpose(1, 2).index_put_((page, place), gradient, accumulate=True)
    return whole


def packed_forward_plain(inputs: Inputs, options: Options) -> Results:
    """Compute `attention_paged_varlen_forward`."""
    packed, _, _ = packed_inputs(inputs)
    return varlen_forward_plain(packed, options)


def packed_backward_plain(arriving: Results, inputs: Inputs, options: Options) -> Tensors:
    """Compute `attention_paged_varlen_backward`."""
    packed, *at = packed_inputs(inputs)
    dq, dk, dv, dsinks = varlen_backward_plain(arriving, packed, options)
    return dq, *put_back_pair((dk, dv), inputs, *at), dsinks


def packed_second_order(
    arriving: Results, inputs: Inputs, cotangents: Tensors, options: Options
) -> Tensors:
    """Return gradients of dout, dlse, q, k, v and sinks from the cotangents of dq, dk, dv and
    dsinks."""
    packed, *at = packed_inputs(inputs)
    x, y, z, of_dsinks = cotangents
    y, z = (None if c is None else taken(c, *at) for c in (y, z))
    *firsts, of_k, of_v, from_sinks = varlen_second_order(
        arriving, packed, (x, y, z, of_dsinks), options
    )
    return *firsts, *put_back_pair((of_k, of_v), inputs, *at), from_sinks


def put_back_pair(gradients: Tensors, inputs: Inputs, page: Tensor, place: Tensor) -> Tensors:
    """Return the gradients of the pages of k and v from those of what `packed_inputs` returned."""
    return tuple(
        None if x is None else put_back(x, pages, page, place)
        for x, pages in zip(gradients, (inputs.k, inputs.v), strict=True)
    )


def padded_inputs(inputs: Inputs) -> Inputs:
    """Return the call with seqlens_k alone that a call with pages amounts to."""
    table = inputs.page_table
    assert table is not None
    k, v = gathered(inputs.k, table), gathered(inputs.v, table)
    return inputs._replace(k=k, v=v, page_table=None)


def paged_forward_plain(inputs: Inputs, options: Options) -> Results:
    """Compute `attention_paged_forward`."""
    return padded_forward_plain(padded_inputs(inputs), options)


def paged_backward_plain(arriving: Results, inputs: Inputs, options: Options) -> Tensors:
    """Compute `attention_paged_backward`."""
    dq, dk, dv, dsinks = padded_backward_plain(arriving, padded_inputs(inputs), options)
    return dq, *scattered_pair((dk, dv), inputs), dsinks


def paged_second_order(
    arriving: Results, inputs: Inputs, cotangents: Tensors, options: Options
) -> Tensors:
    """Return gradients of dout, dlse, q, k, v and sinks from the cotangents of dq, dk, dv and
    dsinks."""
    table = inputs.page_table
    assert table is not None
    x, y, z, of_dsinks = cotangents
    y, z = (None if c is None else gathered(c, table) for c in (y, z))
    *firsts, of_k, of_v, from_sinks = padded_second_order(
        arriving, padded_inputs(inputs), (x, y, z, of_dsinks), options
    )
    return *firsts, *scattered_pair((of_k, of_v), inputs), from_sinks


def scattered_pair(gradients: Tensors, inputs: Inputs) -> Tensors:
    """Return the gradients of the pages of k and v from those of what `padded_inputs` returned."""
    table = inputs.page_table
    assert table is not None
    return tuple(
        None if x is None else scattered(x, pages, table)
        for x, pages in zip(gradients, (inputs.k, inputs.v), strict=True)
    )


def _valid(page_table: Tensor, pages: Tensor) -> Tensor:
    """Return the page table with every entry a page that there is."""
    return page_table.long().clamp(0, max(0, pages.shape[0] - 1))
