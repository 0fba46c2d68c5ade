"""Say what an exact result asks of a kernel: how many keys one sum may go over, and from which size
on a softcap is a large one. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashcore.problem.folding import MAX_QUERIES

if TYPE_CHECKING:
    from flashcore.problem import Problem

# Of more keys than this the portable kernel adds up O and row_sum a chunk after the other
# (fwd_wmma/totals_wmma.cuh). Up to here what tensor cores cut off is 2^-13.5 of the sum at most, a
# third of what rounding to float16 costs.
MAX_KEYS_OF_A_SUM = 2**16
KEYS_OF_CHUNK = 2**14

# Of more keys than this the Hopper kernel's blocks share them: what is cut off up to here is
# 2^-11.5 of the sum at most, or 2^-8.5, about as much as rounding to the dtype costs.
MAX_KEYS_OF_A_SUM_SM90 = {"float16": 2**18, "bfloat16": 2**21}
# Shares of O may take that much memory where they are there for that alone.
MAX_SHARE_BYTES = 2**31

# From here on tanh is computed exactly for scores that are small beside the cap, too: 2^-22 of the
# cap, what it errs otherwise (tile/mask.cuh), is 2^-12 here, half of what rounding P may cost.
LARGE_SOFTCAP = 2.0**10


def keys_of_chunk(problem: Problem) -> int:
    """Return how many keys a sum of the portable kernel goes over, 0 for all."""
    if problem.batch_invariant:
        return 0 if is_cut(problem) else KEYS_OF_CHUNK  # pieces are shorter
    return KEYS_OF_CHUNK if _most_keys_of_a_row(problem) > MAX_KEYS_OF_A_SUM else 0


def is_cut(problem: Problem) -> bool:
    """Return whether a batch-invariant call's keys are shared by blocks, in pieces of one length:
    few queries of sequences that are not packed."""
    return not problem.packs_queries and problem.seqlen_q <= MAX_QUERIES


def fewest_splits(problem: Problem) -> int:
    """Return how many blocks of the Hopper kernel must share a row's keys."""
    if problem.batch_invariant and is_cut(problem):
        return 1  # they do
    return max(1, -(-_most_keys_of_a_row(problem) // MAX_KEYS_OF_A_SUM_SM90[problem.dtype]))


def obstacle_to_splits(problem: Problem) -> str | None:
    """Return why the Hopper kernel cannot share keys that it must share, or None."""
    splits = fewest_splits(problem)
    if splits == 1:
        return None
    limit = f"it sums over at most {MAX_KEYS_OF_A_SUM_SM90[problem.dtype]} keys exactly"
    if problem.packs_queries:
        return f"{limit}, and cannot split those of packed sequences"
    if problem.batch_invariant:
        return f"{limit}, and how many blocks share more depends on the room that there is"
    num_rows = problem.batch * problem.num_heads_q * problem.seqlen_q
    share_bytes = splits * num_rows * (problem.head_dim_v + 2) * 4
    if share_bytes <= MAX_SHARE_BYTES:
        return None
    return f"{limit}, and shares of {problem.seqlen_k} keys would take {share_bytes} bytes"


def _most_keys_of_a_row(problem: Problem) -> int:
    if problem.window_left >= 0 and problem.window_right >= 0:
        return min(problem.seqlen_k, problem.window_left + 1 + problem.window_right)
    return problem.seqlen_k
