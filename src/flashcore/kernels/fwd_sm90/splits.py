"""Choose how many blocks of the Hopper kernel share the keys of a row tile, and how many row tiles
the heads of a group are: a model of a call with few query rows and many keys, which reads K and V
and does little else. Pure functions.

The model's unit of time is a byte: the time in which one SM reads a byte from memory while all SMs
read. A block takes its pieces (a row tile's keys, or a part of them) one after the other, so a call
takes as many rounds as the busiest block has pieces. If several blocks share the keys of a row tile
(split-KV), each writes its share of the result to memory, and one SM reads all shares of that row
tile and adds them up. With many query heads for one head of k and v, adding up may take longer than
reading keys. Then the heads are dealt out to several row tiles: more SMs add up, each fewer rows,
but every row tile reads the keys, the first from memory and the others from L2 if they run at the
same time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from flashcore.kernels.stream_k import SHARE_WEIGHT

if TYPE_CHECKING:
    from flashcore.problem import Problem

# A piece has at least this many key tiles; fewer would take less time than its start and end.
MIN_KEY_TILES = 2
# H100, 2026-11-25, `flashcore bench --groups decode,decode-more`: an SM reads 26 KB/us of K and V,
# as B1 H32/8 S1 D128 took 6.55 us with 64 KB a piece and 24.2 with 512. That leaves 4.0
# of the 6.55, of which a row tile that shares nothing takes 2.7 to 3. Writing a share, the counter,
# and the wait for what is added up take the rest, about 1.
HAND_OVER_BYTES = 26 * 1024
# The weight of a byte of K or V when memory is not the limit, because few SMs read, or several row
# tiles read the same keys, all but one of them from L2: 42 KB/us for an SM. When few SMs read,
# each got more, so fewer splits cost less than the model says: 16 and 22 splits instead of 33 took
# 14.1 and 12.9 us, where the model says 16.7 and 14.1.
L2_WEIGHT = 0.6
# More parts must save at least this fraction of the cost: the model is not more exact than that.
_PARTS_SAVE = 0.1
# And adding up together at least this one of what one SM takes for it alone: by the model 37 % at
# B1 H32/8 S4/16384, whose time it left as it was (H200, 2026-11-30: 28.4 and 28.2 us, a median of
# ratios of 1.016), and 68 % at B4 H8/1 S1/8192 D256 (14.9 and 10.5 us).
_TOGETHER_SAVES = 0.4
_MAX_ROUNDS = 4


def may_add_up_together(problem: Problem, min_blocks: int) -> bool:
    """Return whether a kernel has the registers for that: with a mask tensor, soft-capping, windows
    or largest scores those of a whole SM, and few columns; caches of 8 bits leave none. Mirrored in
    tile/shares.cuh."""
    has_options = problem.mask is not None or problem.softcap != 0.0 or problem.return_max_score
    has_options |= problem.window_left >= 0 or problem.window_right >= 0
    if problem.cache_dtype:
        return False
    return not has_options or (min_blocks == 1 and problem.head_dim_v <= 128)


def adds_up_together(num_splits: int, share_bytes: int) -> bool:
    """Return whether blocks that share a row tile's keys add up its shares together: where that
    saves time in spite of waiting for each other."""
    if num_splits <= 1:
        return False
    alone = _alone(num_splits, share_bytes)
    return _together(share_bytes) < (1 - _TOGETHER_SAVES) * alone


def _alone(num_splits: int, share_bytes: int) -> float:
    return SHARE_WEIGHT * num_splits * share_bytes


def _together(share_bytes: int) -> float:
    return HAND_OVER_BYTES + SHARE_WEIGHT * share_bytes


class Sharing(NamedTuple):
    """A sharing says how the keys of a row tile are split.

    Args:
        cost: see Reading.cost.
        parts: the factor by which folded heads are dealt out to more row tiles than they need.
        num_splits: how many blocks share the keys of a row tile, 1 for no sharing.
    """

    cost: float
    parts: int
    num_splits: int


class Reading(NamedTuple):
    """A reading is a call of few rows, as the model sees it.

    Args:
        row_tiles: of all heads.
        key_tiles: that one row tile visits.
        key_tile_bytes: K and V of a key tile.
        share_bytes: O and the softmax's state of one row tile, float32, of rows that exist.
        num_slots: blocks that run at once.
        readers: row tiles that read the same keys.
        together: whether blocks may add up shares together.
    """

    row_tiles: int
    key_tiles: int
    key_tile_bytes: int
    share_bytes: int
    num_slots: int
    readers: int = 1
    together: bool = True

    def cost(self, num_splits: int) -> float:
        """Return the bytes that the busiest SM has time for until the result is there."""
        rounds = -(-self.row_tiles * num_splits // self.num_slots)
        piece: float = -(-self.key_tiles // num_splits) * self.key_tile_bytes
        if rounds == 1:  # or row tiles that read the same keys do not run at the same time
            busy = self.row_tiles * num_splits / self.num_slots
            piece *= max(busy / self.readers, L2_WEIGHT)
        if num_splits == 1:
            return rounds * piece
        return rounds * (piece + HAND_OVER_BYTES) + self.adding_up(num_splits)

    def adding_up(self, num_splits: int) -> float:
        """Return the part of `cost` that adding up a row tile's shares takes."""
        at_once = self.row_tiles * num_splits <= self.num_slots  # or nobody waits for the others
        if at_once and self._pays_together(num_splits):
            return _together(self.share_bytes)
        return _alone(num_splits, self.share_bytes)

    def _pays_together(self, num_splits: int) -> bool:
        return self.together and adds_up_together(num_splits, self.share_bytes)

    def best_num_splits(self) -> int:
        """Return how many blocks share a row tile's keys where that costs least, 1 for no
        sharing."""
        most = min(self.key_tiles // MIN_KEY_TILES, self.num_slots)
        # The most splits that a number of rounds has room for, and what reading K and V and adding
        # up would want, were there no rounds.
        wanted = [rounds * self.num_slots // self.row_tiles for rounds in range(1, _MAX_ROUNDS + 1)]
        keys = self.key_tiles * self.key_tile_bytes
        wanted.append(math.isqrt(int(keys / (SHARE_WEIGHT * self.share_bytes))))
        # And of those, as few as have pieces no longer, where it costs nothing to add up fewer.
        longest = (max(1, -(-self.key_tiles // max(1, splits))) for splits in wanted)
        equal = [-(-self.key_tiles // tiles) for tiles in longest]
        wanted += [n for n in equal if self._pays_together(n)]
        choices = {1, *(min(splits, most) for splits in wanted if splits > 1)} - {0}
        return min(sorted(choices), key=self.cost)


def best_sharing(
    *,
    num_heads: int,
    num_rows: int,
    folded: int,
    block_m: int,
    key_tiles: int,
    key_tile_bytes: int,
    share_row_bytes: int,
    num_slots: int,
    together: bool = True,
) -> Sharing:
    """Return the numbers of splits, and of parts of folded heads, that cost least together.

    Args:
        num_heads: in all batches, counted with `folded` heads of a group as one.
        num_rows: of such a head.
        folded: heads of q that are one, 1 where heads are not folded.
        block_m: rows of a row tile.
        key_tiles: that one row tile visits.
        key_tile_bytes: K and V of a key tile.
        share_row_bytes: O and the softmax's state of one row, float32.
        num_slots: blocks that run at once.
        together: whether blocks may add up shares together.

    Returns:
        The cheapest, as far as more parts save a tenth.
    """
    best: Sharing | None = None
    for parts in (n for n in range(1, folded + 1) if folded % n == 0):
        rows = num_rows // parts
        readers = parts * -(-rows // block_m)
        reading = Reading(
            row_tiles=num_heads * readers,
            key_tiles=key_tiles,
            key_tile_bytes=key_tile_bytes,
            share_bytes=min(block_m, rows) * share_row_bytes,
            num_slots=num_slots,
            readers=readers,
            together=together,
        )
        num_splits = reading.best_num_splits()
        found = Sharing(reading.cost(num_splits), parts, num_splits)
        if best is not None and found.cost > (1 - _PARTS_SAVE) * best.cost:
            break  # still more parts read still more
        best = found
        if num_splits == 1 or reading.adding_up(num_splits) < _PARTS_SAVE * best.cost:
            break  # all that more parts can save; each one tried delays a new shape's first call
    assert best is not None  # there is one part
    return best
