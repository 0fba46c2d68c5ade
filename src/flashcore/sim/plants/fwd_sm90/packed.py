"""This module plants bugs in how the device cuts the keys of packed sequences into ranges; see
plants.py (tests/plants/test_sim_plants_folded.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name

# The call that shows them: sequences of no query, of three row tiles, of which two are full but for
# the row that is nobody's, of 30 rows, and of 3; and rows behind the last. Three blocks have 48 key
# tiles each: the second begins in the second of those row tiles, the third in the sequence behind.
CALL: dict[str, Any] = {
    "lengths_q": (0, 45, 10, 1),
    "lengths_k": (3, 500, 700, 40),
    "num_heads_q": 6,
    "num_heads_kv": 2,
    "head_dim": 32,
    "head_dim_v": 40,
    "causal": "lower_right",
    "sinks": True,
    "tail": 2,
}
TILE: dict[str, Any] = {
    "block_m": 64,
    "block_n": 32,
    "num_stages": 2,
    "min_blocks": 1,
    "stream_k": True,
}
_WALK = "tile/stream_k.cuh"
_SHARES = "tile/shares.cuh"

PLANTS_PACKED = by_name(
    Plant(
        name="packed-slot-of-own-rows",
        title="slots lie as far apart as each sequence has rows",
        file=_SHARES,
        find="  return PACKED ? BLOCK_M : min_i(BLOCK_M, p.seqlen_q);",
        replace="  return min_i(BLOCK_M, p.seqlen_q);",
        caught_by="double-write",
        or_by=("race", "wrong-result", "uninitialized-read"),
    ),
    Plant(
        name="packed-first-row-tile-alone",
        title="of a sequence with several row tiles the line has the first",
        file=_WALK,
        find="    if (PACKED) each_row_tile(p, item, m_block + 1, take);",
        replace="",
        caught_by="uninitialized-read",
        or_by=("out-of-bounds", "counter-left", "double-write", "unwritten-output"),
    ),
    Plant(
        name="packed-row-tile-kept",
        title="a range that begins in a later row tile begins in the first lane's",
        file=_WALK,
        find="    if (PACKED) m_block = of_lane(is_here, m_block);",
        replace="",
        caught_by="double-write",
        or_by=("uninitialized-read", "unwritten-output", "misuse", "out-of-bounds"),
    ),
    Plant(
        name="packed-range-of-one-head",
        title="the number of some heads that are one is taken for that of a head",
        file=_WALK,
        find="(head * p.splits.num_lines + line_idx(p)) * heads_folded(p);",
        replace="head * p.splits.num_lines + line_idx(p);",
        caught_by="double-write",
        or_by=("out-of-bounds", "race"),
    ),
    Plant(
        name="packed-nobody-added-up",
        title="shares of rows that are nobody's are added up, too",
        file=_SHARES,
        find="FOLDS_PACKED ? rows_of_box(p) : 64;",
        replace="64;",
        caught_by="uninitialized-read",
        or_by=("double-write",),
    ),
    Plant(
        name="packed-tail-in-no-range",
        title="the rows behind the last sequence are in no range",
        file=_WALK,
        find="return PACKED ? p.batch + 1 :",
        replace="return PACKED ? p.batch :",
        caught_by="unwritten-output",
    ),
)
