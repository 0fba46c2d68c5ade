"""Make the calls over a cache whose host time bench-host measures: steps of a decoder."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import flashcore
from flashcore.compat import flash_attn, flash_attn_3

PAGE_SIZE = 64
# What a step may take of a dense call. With new tokens it launches two kernels.
ONE_LAUNCH, TWO_LAUNCHES = 1.3, 2.0

Call = Callable[[], object]


class CacheCall(NamedTuple):
    """A CacheCall is one way to call flashcore, or a peer, over a cache.

    Args:
        call: makes one eager call.
        bar: by how much of a dense call's time it may take; None for a peer.
    """

    call: Call
    bar: float | None = ONE_LAUNCH


def cache_calls(q: Tensor, k: Tensor) -> dict[str, CacheCall]:
    """Return the calls by name: one query of each sequence, and perhaps one new token, over a cache
    of as many tokens as k has.

    Args:
        q: [batch, num_heads_q, seqlen, head_dim], of which the last query counts.
        k: [batch, num_heads_kv, seqlen, head_dim], of which sizes, dtype and device count.
    """
    batch, heads_kv, seqlen, dim = k.shape
    columns = seqlen // PAGE_SIZE + 1
    device, whole = k.device, (batch, heads_kv, columns * PAGE_SIZE, dim)
    caches = [torch.randn(whole, device=device).to(k.dtype) for _ in range(2)]
    # Tokens before heads, as flash-attn has them.
    rows = [x.reshape(-1, heads_kv, PAGE_SIZE, dim).transpose(1, 2).contiguous() for x in caches]
    pages = [x.transpose(1, 2) for x in rows]
    caches_8_bit, pages_8_bit = ([x.to(torch.float8_e4m3fn) for x in y] for y in (caches, pages))
    numbers = functools.partial(torch.arange, dtype=torch.int32, device=device)
    table, ends = numbers(batch * columns).view(batch, columns), numbers(batch + 1)
    lengths = torch.full((batch,), seqlen, dtype=torch.int32, device=device)
    query = q[:, :, -1:].contiguous()
    query_row = query.transpose(1, 2).contiguous()
    chunk, chunk_ends = q.transpose(1, 2).flatten(0, 1).contiguous(), seqlen * ends
    packed, out = query_row.flatten(0, 1), torch.empty_like(query_row.flatten(0, 1))
    new = [torch.randn(batch, heads_kv, 1, dim, device=device).to(k.dtype) for _ in range(2)]
    new_rows = [x.transpose(1, 2) for x in new]
    angles = [torch.randn(seqlen + 1, dim // 2, device=device).to(k.dtype) for _ in range(2)]
    one = torch.ones((), device=device)
    (k_rows, v_rows), (k_pages, v_pages), (cos, sin) = rows, pages, angles
    (k_new, v_new), (k_new_row, v_new_row) = new, new_rows
    step, of_2 = flashcore.attention_with_kvcache, flash_attn.flash_attn_with_kvcache
    of_3, as_vllm = flash_attn_3.flash_attn_with_kvcache, flash_attn_3.flash_attn_varlen_func
    found = {
        "attention_with_kvcache, one piece": CacheCall(
            lambda: step(query, *caches, seqlens_k=lengths)
        ),
        "attention_with_kvcache, pages": CacheCall(
            lambda: step(query, k_pages, v_pages, seqlens_k=lengths, page_table=table)
        ),
        "attention_with_kvcache, pages, packed prompts": CacheCall(
            lambda: step(
                chunk, k_pages, v_pages, seqlens_k=lengths, page_table=table,
                cu_seqlens_q=chunk_ends, max_seqlen_q=seqlen,
            )
        ),
        "attention_with_kvcache, pages of 8 bits": CacheCall(
            lambda: step(
                query, *pages_8_bit, seqlens_k=lengths, page_table=table, k_scale=one, v_scale=one
            )
        ),
        "attention_with_kvcache, new tokens": CacheCall(
            lambda: step(
                query, k_pages, v_pages, k_new, v_new, seqlens_k=lengths, page_table=table
            ),
            TWO_LAUNCHES,
        ),
        "attention_with_kvcache, new tokens, rotary": CacheCall(
            lambda: step(
                query, k_pages, v_pages, k_new, v_new, seqlens_k=lengths, page_table=table,
                rotary_cos=cos, rotary_sin=sin, rotary_interleaved=False,
            ),
            TWO_LAUNCHES,
        ),
        "attention, seqlens_k, 8 bits": CacheCall(
            lambda: flashcore.attention(
                query, *caches_8_bit, seqlens_k=lengths, k_scale=one, v_scale=one
            )
        ),
        "flash_attn_with_kvcache": CacheCall(
            lambda: of_2(
                query_row, k_rows, v_rows, cache_seqlens=lengths, block_table=table, causal=True
            )
        ),
        "flash_attn_with_kvcache, new tokens": CacheCall(
            lambda: of_2(
                query_row, k_rows, v_rows, k_new_row, v_new_row, cache_seqlens=lengths,
                block_table=table, causal=True,
            ),
            TWO_LAUNCHES,
        ),
        "flash_attn_with_kvcache, new tokens, rotary": CacheCall(
            lambda: of_2(
                query_row, k_rows, v_rows, k_new_row, v_new_row, cos, sin, lengths,
                block_table=table, causal=True,
            ),
            TWO_LAUNCHES,
        ),
        "flash_attn_with_kvcache of version 3": CacheCall(
            lambda: of_3(
                query_row, k_rows, v_rows, cache_seqlens=lengths, page_table=table, causal=True
            )
        ),
        "flash_attn_varlen_func of version 3, pages, out": CacheCall(  # as vLLM calls it
            lambda: as_vllm(
                packed, k_rows, v_rows, ends, None, 1, seqlen, seqused_k=lengths, causal=True,
                block_table=table, out=out,
            )
        ),
    }  # fmt: skip
    try:
        of_peer = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    except ImportError:  # it is not here, or not built for this torch
        return found
    peer = CacheCall(
        lambda: of_peer(
            query_row, k_rows, v_rows, cache_seqlens=lengths, page_table=table, causal=True
        ),
        None,
    )
    return found | {"flash_attn_with_kvcache of flash-attn 3 itself": peer}
