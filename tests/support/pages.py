"""Make paged caches for tests, with fields of a PagedCase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashcore.checks.accuracy import error_report
from flashcore.checks.paged_cases import Cache, PagedCase, make_paged_inputs

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
