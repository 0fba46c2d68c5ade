"""How many blocks of the Hopper kernel share the keys of a row tile: a model of a call with few
query rows and many keys, which reads K and V and does little else. Pure functions.

Time is counted in bytes that one SM reads in it, while all SMs read. A block takes its pieces one
after the other, so a call takes as many rounds as the busiest block has pieces. A share that is not
the only one is written, counted, and read again by whoever adds up: all of a row tile's by one SM.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashcore.problem import Problem

# A piece has more than that many key tiles, or its start and end would be most of it.
MIN_KEY_TILES = 2
# Writing a share, the counter, and the wait for what is added up: about 1 us of an SM's 33 GB/s.
# An estimate; to be measured.
HAND_OVER_BYTES = 32 * 1024
# From L2 one SM reads about twice as fast, while the others are done, as beside all others.
SHARE_WEIGHT = 0.5
_MAX_ROUNDS = 4


def visible_keys(problem: Problem) -> int:
    """Keys that some query sees; where only the device knows a sequence's length, as many as there
    can be."""
    begin, end = 0, problem.seqlen_k
    if problem.varlen == "none":
        if problem.window_left >= 0:
            begin = max(begin, problem.diag_offset - problem.window_left)
        if problem.window_right >= 0:
            last_query = problem.seqlen_q - 1 + problem.diag_offset
            end = min(end, last_query + problem.window_right + 1)
    return max(0, end - begin)


def cost(
    num_splits: int,
    *,
    row_tiles: int,
    key_tiles: int,
    key_tile_bytes: int,
    share_bytes: int,
    num_slots: int,
) -> float:
    """Bytes that the busiest SM has time for until the result is there. See `best_num_splits`."""
    rounds = -(-row_tiles * num_splits // num_slots)
    piece = -(-key_tiles // num_splits) * key_tile_bytes
    if num_splits == 1:
        return rounds * piece
    return rounds * (piece + HAND_OVER_BYTES) + SHARE_WEIGHT * num_splits * share_bytes


def best_num_splits(
    *, row_tiles: int, key_tiles: int, key_tile_bytes: int, share_bytes: int, num_slots: int
) -> int:
    """The number of splits that costs least.

    Args:
        row_tiles: of all heads.
        key_tiles: that one row tile visits.
        key_tile_bytes: K and V of a key tile.
        share_bytes: O and the softmax's state of one row tile, float32, of rows that exist.
        num_slots: blocks that run at once.

    Returns:
        Blocks that share a row tile's keys, 1 for no sharing.
    """
    sizes = {
        "row_tiles": row_tiles,
        "key_tiles": key_tiles,
        "key_tile_bytes": key_tile_bytes,
        "share_bytes": share_bytes,
        "num_slots": num_slots,
    }
    most = min(key_tiles // MIN_KEY_TILES, num_slots)
    # The most splits that a number of rounds has room for, and what reading K and V and adding up
    # would want, were there no rounds.
    wanted = [rounds * num_slots // row_tiles for rounds in range(1, _MAX_ROUNDS + 1)]
    wanted.append(math.isqrt(int(key_tiles * key_tile_bytes / (SHARE_WEIGHT * share_bytes))))
    choices = {1, *(min(splits, most) for splits in wanted if splits > 1)} - {0}
    return min(sorted(choices), key=lambda num_splits: cost(num_splits, **sizes))
