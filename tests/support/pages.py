"""Make paged caches for tests, with fields of a PagedCase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from backends import device_of
from flashcore.checks.accuracy import error_report
from flashcore.checks.paged_cases import Cache, PagedCase, make_paged_inputs
from flashcore.ops.paged_varlen import attention_paged_varlen

__all__ = ["Cache", "make_cache"]


def make_cache(
    page_size: int,
    lengths: Sequence[int],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float16,
    **fields: Any,
) -> Cache:
    """Return the tensors of a PagedCase with these fields."""
    name = str(dtype).removeprefix("torch.")
    case = PagedCase(page_size=page_size, lengths=tuple(lengths), dtype=name, **fields)
    return make_paged_inputs(case, device)


def packed_over_pages(
    backend: str,
    counts: Sequence[int],
    lengths: Sequence[int],
    cache_dtype: str = "",
    **options: Any,
) -> tuple[Cache, torch.Tensor, Any]:
    """Compute packed queries of 7 heads over one head of keys in pages of 16.

    Args:
        backend: of the call.
        counts: queries of each sequence.
        lengths: keys of each; what a sequence's keys are does not depend on other lengths.
        cache_dtype: "float8_e4m3fn" for a cache of 8 bits.
        options: of the call.

    Returns:
        The cache, packed queries, and what attention_paged_varlen returns for them, with lse.
    """
    cache = make_cache(
        16, lengths, seqlen_q=max(counts), device=device_of(backend), num_heads_q=7,
        num_heads_kv=1, dtype=torch.bfloat16, cache_dtype=cache_dtype,
    )  # fmt: skip
    q = torch.cat([x[:, :n].transpose(0, 1) for x, n in zip(cache.q, counts, strict=True)])
    ends = torch.tensor([0, *counts], device=q.device).cumsum(0).int()
    _, *of_keys = cache.arguments()
    results = attention_paged_varlen(
        q, *of_keys, ends, max(counts), return_lse=True, causal=True, backend=backend, **options,
        **cache.scales(),
    )  # fmt: skip
    return cache, q, results


def check_packed(
    cache: Cache,
    counts: Sequence[int],
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    **options: Any,
) -> None:
    """Hold every sequence of a packed call to the error rule, by the oracle for it alone.

    Args:
        cache: of all sequences.
        counts: queries of each.
        q: packed queries.
        out: what the call returned for them.
        lse: the same.
        options: of the call.
    """
    begin = 0
    for b, n in enumerate(counts):
        rows = slice(begin, begin + n)
        _, k, v = cache.sequence(b)
        if n:
            own = out[rows].transpose(0, 1)[None], q[rows].transpose(0, 1)[None]
            report = error_report(*own, k, v, lse=lse[None, :, rows], **options)
            assert report.ok, f"sequence {b}: {report}"
        begin += n
