"""Say which problems the Hopper kernel cannot serve, which tensors TMA cannot read in place, and
which pages it can in boxes of all columns."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flashcore.kernels.fwd_sm90 import tiles as tiles_sm90
from flashcore.problem.exactness import obstacle_to_splits

if TYPE_CHECKING:
    from flashcore.problem import Problem


def obstacle(problem: Problem) -> str | None:
    """Return why the Hopper kernel cannot serve a problem, or None."""
    num_rows = problem.total_q * problem.num_heads_q  # 0 unless packed
    if num_rows + problem.batch >= 2**30 and problem.packs_queries:
        return "it counts the row tiles of all packed sequences in 32 bits"
    reason = _obstacle_to_pages(problem) if problem.has_pages else None
    if problem.cache_dtype and not problem.is_readable:
        return "it reads caches of 8 bits in rows of whole 16 bytes, contiguous"
    if problem.cache_dtype and problem.batch_invariant:
        return "it is not batch-invariant with caches of 8 bits"
    if problem.cache_dtype and problem.packs_queries and problem.mask is not None:
        is_wide = max(problem.head_dim, problem.head_dim_v) > 192
        if is_wide and problem.softcap and tiles_sm90.is_bounded(problem):
            return (
                "its registers do not hold trees of packed queries, a window and soft-capping "
                "beside a cache of 8 bits with head_dim above 192"
            )
    return reason or next(iter(unreadable(problem).values()), None) or obstacle_to_splits(problem)


def _obstacle_to_pages(problem: Problem) -> str | None:
    if problem.page_size % tiles_sm90.PAGE_ROWS:
        return (
            f"it reads pages of a multiple of {tiles_sm90.PAGE_ROWS} keys, not of "
            f"{problem.page_size}"
        )
    of_page, _, of_row = problem.v_strides
    if of_row and problem.num_pages * (of_page // of_row) + problem.page_size >= 2**31:
        return "it counts the rows of all pages of v in 32 bits"
    return None


@functools.lru_cache(maxsize=4096)
def unreadable(problem: Problem) -> Mapping[str, str]:
    """Return those of "q", "k" and "v" that TMA cannot read as they lie, and why: it reads rows
    that start at multiples of 16 bytes. A stride of 0 between batches or heads reads the same rows
    again."""
    found: dict[str, str] = {}
    if problem.load_bytes < 16:
        for name in problem.misaligned or "qkv":
            found[name] = (
                f"TMA needs 16-byte aligned rows, and some address or stride of {name} is a "
                f"multiple of {problem.load_bytes} bytes only"
            )
    packed, pages = problem.packs_queries, problem.has_pages
    ragged = "v" if pages else "kv" if problem.varlen == "keys" else ""
    rows_q = problem.total_q if packed else problem.seqlen_q
    rows_k = problem.page_size if pages else problem.total_k if packed else problem.seqlen_k
    for name, strides, rows in (
        ("q", problem.q_strides, rows_q),
        ("k", problem.k_strides, rows_k),
        ("v", problem.v_strides, rows_k),
    ):
        begins_by_row = name in ragged  # params_sm90.make_ragged
        if name in found:
            continue
        if strides[2] == 0 and rows > 1:
            found[name] = f"the Hopper kernel reads rows apart, and {name} is one row, expanded"
        elif max(strides) >= 2**39:
            found[name] = f"TMA reads no stride of 2^40 bytes, as {name} has"
        elif begins_by_row and strides[2] and strides[0] % strides[2]:
            found[name] = (
                f"with seqlens_k it needs {'pages' if pages else 'batches'} that are whole rows "
                f"apart, unlike {name}'s"
            )
    return found


def loads_whole_rows(problem: Problem) -> bool:
    """Return whether TMA loads all columns of a page's rows in one box, instead of a box for each
    chunk of columns: of small pages, where boxes take long, and of pages that are whole groups of
    rows apart."""
    if not problem.has_pages or problem.cache_dtype or problem.page_size > tiles_sm90.SMALL_PAGE:
        return False
    dim, (of_page, _, of_row) = problem.head_dim, problem.k_strides
    if dim != problem.head_dim_v or dim <= 64 or dim % 64 or of_row == 0:
        return False
    num_rows = problem.num_pages * (of_page // of_row) + problem.page_size
    return of_page % (tiles_sm90.PAGE_ROWS * of_row) == 0 and num_rows < 2**31
