"""Say of which calls the device cuts the keys into ranges (tile/stream_k.cuh), as only it knows how
many there are. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashcore.kernels.stream_k import FEW_BYTES, MOST_TILES
from flashcore.problem.folding import are_few_queries, most_keys

if TYPE_CHECKING:
    from flashcore.problem import Problem

# Up to so many rows a sequence reading K and V is all there is to do: those of a consumer. Packed
# sequences have as many in the mean.
FEW_ROWS = 64


def has_few_rows(problem: Problem) -> bool:
    """Return whether sequences have so few rows that reading keys is the most of the work, by their
    mean where queries are packed."""
    if problem.packs_queries and not are_few_queries(problem):
        return False
    return problem.seqlen_q <= FEW_ROWS


def lengths_differ(problem: Problem, block_m: int, block_n: int) -> bool:
    """Return whether it pays that the device looks at the lengths of all padded sequences first:
    what splits by the longest possible one may leave undone takes longer."""
    row_tiles = problem.batch * problem.num_heads_q * -(-problem.seqlen_q // block_m)
    if row_tiles * -(-problem.seqlen_k // block_n) >= MOST_TILES:
        return False
    keys = problem.batch * problem.seqlen_k
    return problem.varlen != "none" and problem.batch > 1 and not _are_few_keys(problem, keys, 2)


def cuts_packed_keys(problem: Problem, block_m: int, block_n: int) -> bool:
    """Return whether the device cuts the keys of packed sequences: where queries are few beside
    them. Of one sequence, too, for no other splits them."""
    if not has_few_rows(problem) or block_m > FEW_ROWS:
        return False
    row_tiles = (problem.total_q + problem.batch + 1) * problem.num_heads_q  # at most
    if row_tiles * -(-problem.seqlen_k // block_n) >= MOST_TILES:
        return False
    return not _are_few_keys(problem, most_keys(problem), problem.cache_bytes)


def _are_few_keys(problem: Problem, keys: int, element_bytes: int) -> bool:
    dims = problem.head_dim + problem.head_dim_v
    return keys * problem.num_heads_kv * dims * element_bytes <= FEW_BYTES
