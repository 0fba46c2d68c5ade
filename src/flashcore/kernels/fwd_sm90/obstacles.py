"""Say which problems the Hopper kernel cannot serve, and which tensors TMA cannot read in place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flashcore.problem.exactness import obstacle_to_splits

if TYPE_CHECKING:
    from flashcore.problem import Problem


def obstacle(problem: Problem) -> str | None:
    """Return why the Hopper kernel cannot serve a problem, or None."""
    num_rows = problem.total_q * problem.num_heads_q  # 0 unless packed
    if num_rows + problem.batch >= 2**30 and problem.varlen == "packed":
        return "it counts the row tiles of all packed sequences in 32 bits"
    if problem.varlen == "pages":
        return "it reads no pages"
    return next(iter(unreadable(problem).values()), None) or obstacle_to_splits(problem)


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
    packed, keys = problem.varlen == "packed", problem.varlen == "keys"
    rows_q = problem.total_q if packed else problem.seqlen_q
    rows_k = problem.total_k if packed else problem.seqlen_k
    for name, strides, rows in (
        ("q", problem.q_strides, rows_q),
        ("k", problem.k_strides, rows_k),
        ("v", problem.v_strides, rows_k),
    ):
        begins_by_row = keys and name != "q"  # params_sm90.make_ragged
        if name in found:
            continue
        if strides[2] == 0 and rows > 1:
            found[name] = f"the Hopper kernel reads rows apart, and {name} is one row, expanded"
        elif max(strides) >= 2**39:
            found[name] = f"TMA reads no stride of 2^40 bytes, as {name} has"
        elif begins_by_row and strides[2] and strides[0] % strides[2]:
            found[name] = (
                f"with seqlens_k it needs batches that are whole rows apart, unlike {name}'s"
            )
    return found
