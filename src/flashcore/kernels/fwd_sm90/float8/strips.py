"""Say what strips of few query rows take whose warps share tiles of 8 bits
(fwd_sm90/float8/few_rows_sm90.cuh). Pure functions."""

from __future__ import annotations

import math

ROWS_OF_STRIP = 8
SWIZZLED_BYTES = 64  # the least that rows in shared memory have, for 8 of them to lie apart


def strips_of_warp(strips: int, head_dim: int, head_dim_v: int) -> int:
    """Return how many of a row tile's strips a warp has: two, or one where head_dims are wide, as Q
    and O of two take more registers than there are."""
    return min(strips, 1 if max(head_dim, head_dim_v) > 128 else 2)


def most_strips(head_dim: int, head_dim_v: int) -> int:
    """Return how many strips a row tile may have: each warp converts keys for its own, and four
    that do so for one strip each are no faster than who converts them once."""
    return 2 * strips_of_warp(2, head_dim, head_dim_v)


def loaded_dims(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """Return the columns of a tile of K and of V, bytes, as TMA loads them: whole chunks."""
    chunk = chunk_of_bytes(head_dim, head_dim_v)
    return -(-head_dim // chunk) * chunk, -(-head_dim_v // chunk) * chunk


def chunk_of_bytes(head_dim: int, head_dim_v: int) -> int:
    """Return the columns that lie together in shared memory: 64 or 128, no more than needed."""
    dims = (-(-dim // SWIZZLED_BYTES) * SWIZZLED_BYTES for dim in (head_dim, head_dim_v))
    return math.gcd(128, *dims)


def shared_bytes(warp_strips: int, columns: int) -> int:
    """Return the bytes in which four warps hand over their rows of O, maxima and sums; four floats
    of each row are for banks."""
    return 4 * warp_strips * ROWS_OF_STRIP * (columns + 4 + 2) * 4
