"""Fold few queries a head (pack-GQA): the heads of a group as rows of one head, so that they share
a row tile.

A row tile has 64 rows or more, and its keys and values are read once. Where a head has one query,
as in decoding, its tile would be nearly empty, and every head of a group would read the same keys
again. But [batch, num_heads_kv * group, seqlen_q, dim] is [batch, num_heads_kv, group * seqlen_q,
dim] in memory, if heads lie seqlen_q rows apart: row r of that is query r % seqlen_q of the group's
head r / seqlen_q. The kernels need to know no more than that, and only where a bound depends on the
query (tile/band.cuh). Nor need it be all heads of a group: where the group is large, a divisor
of it leaves more row tiles (kernels/fwd_sm90/splits.py). Several queries of a q that is [batch,
seqlen_q, num_heads_q, dim] in memory, as projections write it, are copied first, which is little
beside the keys.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashcore.problem import Problem

# Above it one head's rows fill a tile, and a tile of rows that follow each other skips more keys.
MAX_QUERIES = 32
# A copy of q pays if folding spares the reading of so many bytes: 16 MB take 3 us from L2, and so
# does the copy, about. Measured on an H200 (2026-11-29, 24 shapes of 2 to 32 queries, D128):
# with this bound calls take 0.8 % more, on average, than the better of both, with no other less.
COPY_PAYS_BYTES = 16 * 2**20
# Of packed queries: those of a sequence in the mean, up to which heads are folded. With twice 128
# heads of a group fill row tiles either way.
MAX_MEAN_QUERIES = 512
BOX_ROWS = 64  # of Q that TMA loads as one: whole queries
_LEAST_ROWS = 48  # of a box that some query has, or too much is computed for nobody
_MAX_ROW_STRIDE = 2**31 - 1  # in elements, as in kernels/fwd_wmma/params.py


def can_fold(problem: Problem) -> bool:
    """Return whether the heads of a group can be rows of one: q and the mask then have one stride
    between rows, or all heads share a tree. The output and lse, which are contiguous, always
    have."""
    length = problem.seqlen_q
    if problem.packs_queries or problem.group_size < 2 or not 1 <= length <= MAX_QUERIES:
        return False
    is_tree = problem.mask is not None and problem.mask.dtype == "tree"
    if problem.mask is not None and is_tree and problem.mask.strides[1]:
        return False
    _, head_stride, row_stride = problem.q_strides
    if length == 1:
        return head_stride <= _MAX_ROW_STRIDE
    if head_stride != length * row_stride:
        return False
    if problem.mask is None or is_tree:
        return True
    return problem.mask.strides[1] == length * problem.mask.strides[2]


def heads_of_packed_rows(problem: Problem) -> int:
    """Return how many heads of a group are rows of one in a call of packed queries
    (tile/folded_rows.cuh); 0 where none are.

    Only the device knows how many queries a sequence has. Where queries are few in the mean, some
    sequences have next to none, and keys are read as often as there are row tiles; a tile of many
    queries does the same work whether they are one head's or a few of all heads. Batch-invariant
    calls, whose neighbours must not decide, are folded wherever there are pages.
    """
    group, batch = problem.group_size, max(1, problem.batch)
    if not problem.packs_queries or group < 2:
        return 0
    if problem.mask is not None and problem.mask.strides[1]:  # each head has a tree of its own
        return 0
    few = problem.total_q <= MAX_MEAN_QUERIES * batch and are_few_queries(problem)
    if problem.batch_invariant:
        few = problem.has_pages
    if not few:
        return 0
    used = (n for n in range(min(group, BOX_ROWS), 1, -1) if group % n == 0)
    return next((n for n in used if BOX_ROWS // n * n >= _LEAST_ROWS), 0)


def most_keys(problem: Problem) -> int:
    """Return how many keys all sequences have together at most."""
    is_packed = problem.varlen == "packed"
    return problem.total_k if is_packed else max(1, problem.batch) * problem.seqlen_k


def are_few_queries(problem: Problem) -> bool:
    """Return whether packed queries are few beside their keys, unlike those of prompts over
    themselves."""
    return 4 * problem.total_q <= most_keys(problem)


def mean_sequences(problem: Problem, num_heads: int) -> Problem:
    """Return packed sequences as a batch of equal ones, with `num_heads` heads, if there are, as
    rows of one."""
    num_heads = max(1, num_heads)
    return dataclasses.replace(
        problem,
        batch=max(1, problem.batch),
        num_heads_q=problem.num_heads_q // num_heads,
        seqlen_q=packed_rows(problem, num_heads),
    )


def packed_rows(problem: Problem, num_heads: int) -> int:
    """Return how many rows a mean packed sequence has where `num_heads` heads are rows of one."""
    last = max(1, -(-problem.total_q // max(1, problem.batch))) - 1
    queries = BOX_ROWS // num_heads
    return last // queries * BOX_ROWS + (last % queries + 1) * num_heads


def with_copied_q(problem: Problem) -> Problem | None:
    """Return the problem as it is once q has been copied, `q.contiguous()`, where that alone keeps
    heads from being folded and the copy pays; else None."""
    heads, length, dim = problem.num_heads_q, problem.seqlen_q, problem.head_dim
    if problem.group_size < 2 or not 1 < length <= MAX_QUERIES or can_fold(problem):
        return None
    again = problem.batch * (heads - problem.num_heads_kv) * problem.seqlen_k
    if again * (dim + problem.head_dim_v) * 2 < COPY_PAYS_BYTES:
        return None
    strides = (heads * length * dim if problem.batch > 1 else 0, length * dim, dim)
    copied = dataclasses.replace(problem, q_strides=strides)
    return copied if can_fold(copied) else None


@functools.lru_cache(maxsize=4096)
def fold_heads(problem: Problem, num_heads: int) -> Problem:
    """Return the same call with heads of a group as rows of one head.

    Args:
        problem: one that `can_fold`, and has not been folded.
        num_heads: heads that become one, a divisor of group_size.

    Returns:
        A Problem with num_heads_q / num_heads heads and num_heads times the rows. Bounds stay those
        of the queries: row r has the bounds of query r % problem.seqlen_q.

    Raises:
        ValueError: num_heads does not divide the group.
    """
    length = problem.seqlen_q
    if num_heads < 1 or problem.group_size % num_heads:
        raise ValueError(
            f"num_heads={num_heads}: heads are folded by a divisor of the group's "
            f"{problem.group_size}; take the plan that was made for this problem"
        )
    num_folded = problem.num_heads_q // num_heads
    batch_stride, head_stride, row_stride = problem.q_strides
    mask = problem.mask
    if mask is not None:
        of_batch, of_head, of_row, of_key = mask.strides
        strides = (of_batch, num_heads * of_head, of_row if length > 1 else of_head, of_key)
        mask = dataclasses.replace(mask, strides=strides)
    return dataclasses.replace(
        problem,
        num_heads_q=num_folded,
        seqlen_q=num_heads * length,
        q_strides=(
            batch_stride,
            num_heads * head_stride if num_folded > 1 else 0,
            row_stride if length > 1 else head_stride,
        ),
        mask=mask,
    )


def as_launched(problem: Problem, folds_heads: int) -> Problem:
    """Return the problem as the kernel of a plan with so many `folds_heads` sees it. Of the problem
    as it was asked: one that is folded in part could be folded again."""
    if folds_heads and can_fold(problem):
        return fold_heads(problem, folds_heads)
    return problem
