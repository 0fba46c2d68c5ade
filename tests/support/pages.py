"""Make paged caches for tests, with fields of a PagedCase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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
