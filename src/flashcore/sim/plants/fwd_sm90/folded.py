"""This module plants bugs in how the heads of a group become rows of packed sequences; see
plants.py (tests/plants/test_sim_plants_folded.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name

# The call that shows them: 64 rows hold 21 queries of 3 heads, and one row is nobody's. Sequences
# have two boxes, no query, one, and as many as fill a box; keys are so many that heads are folded.
CALL: dict[str, Any] = {
    "lengths_q": (25, 0, 1, 21),
    "lengths_k": (50, 3, 90, 60),
    "num_heads_q": 6,
    "num_heads_kv": 2,
    "head_dim": 32,
    "head_dim_v": 32,
    "causal": "lower_right",
    "sinks": True,
}
TILE: dict[str, Any] = {"block_m": 128, "block_n": 32, "num_stages": 2, "ping_pong": True}
_ROWS = "tile/folded_rows.cuh"
_SCHEDULE = "tile/schedule_varlen.cuh"
_PRODUCER = "fwd_sm90/producer_sm90.cuh"

PLANTS_FOLDED_SM90 = by_name(
    Plant(
        name="packed-query-as-row",
        title="a row of packed folded heads has the place and the bounds of its number",
        file=_ROWS,
        find="return row / BOX_OF_ROWS * queries_of_box(p) + row % BOX_OF_ROWS / heads_folded(p);",
        replace="return row;",
        caught_by="misuse",  # a box behind the last row
        or_by=("out-of-bounds", "double-write", "wrong-result"),
    ),
    Plant(
        name="packed-head-of-the-first",
        title="all rows are the first head's",
        file=_ROWS,
        find="return FOLDS_PACKED ? row % BOX_OF_ROWS % heads_folded(p) : 0;",
        replace="return 0;",
        caught_by="double-write",
    ),
    Plant(
        name="packed-row-of-nobody",
        title="the rows that heads leave over count as those of the next query",
        file=_ROWS,
        find="const bool is_of_box = !FOLDS_PACKED || row % BOX_OF_ROWS < rows_of_box(p);",
        replace="const bool is_of_box = true;",
        caught_by="double-write",
    ),
    Plant(
        name="packed-last-query-alone",
        title="of a sequence's last query there is one head",
        file=_ROWS,
        find="(last % queries + 1) * heads_folded(p);",
        replace="last % queries * heads_folded(p) + 1;",
        caught_by="unwritten-output",
    ),
    Plant(
        name="packed-full-box-one-more",
        title="queries that fill their boxes have the rows that are nobody's, too",
        file=_ROWS,
        find="const int last = count - 1;",
        replace="const int last = count - (count % queries > 0 ? 1 : 0);",
        caught_by="unwritten-output",
        or_by=("misuse", "double-write", "out-of-bounds", "wrong-result", "uninitialized-read"),
    ),
    Plant(
        name="packed-heads-one-by-one",
        title="the number of some heads that are one is taken for that of a head",
        file=_SCHEDULE,
        find="head * heads_folded(p);",
        replace="head;",
        caught_by="double-write",
        or_by=("out-of-bounds", "race"),
    ),
    Plant(
        name="packed-tiles-of-queries",
        title="tiles are counted by queries, not by rows",
        file=_SCHEDULE,
        find="const int rows = OWNS_KEYS ? keys : rows_of_queries(p, queries);",
        replace="const int rows = OWNS_KEYS ? keys : queries;",
        caught_by="unwritten-output",
        plan={"block_m": 64, "ping_pong": False},
    ),
    Plant(
        name="packed-turn-miscounted",
        title="a tile of many rows that is taken in turn is not counted yet",
        file=_SCHEDULE,
        find="const int many_before = (number + 1) / 2;",
        replace="const int many_before = number / 2;",
        caught_by="unwritten-output",
        or_by=("double-write",),
    ),
    Plant(
        name="packed-turns-counter-left",
        title="the counter of tiles in turns is not put back for the next launch",
        file=_SCHEDULE,
        find="gmem_atomic_add(p.tile_counter, -total);",
        replace="",
        caught_by="counter-left",
    ),
    Plant(
        name="packed-bounds-of-the-first",
        title="the keys of a tile are those of its first query",
        file="tile/band.cuh",
        find="return {query_of(p, row_begin), query_of(p, last_row)};",
        replace="return {query_of(p, row_begin), query_of(p, row_begin)};",
        caught_by="wrong-result",
    ),
    Plant(
        name="packed-box-of-64-rows",
        title="more bytes are announced than a box of whole queries has",
        file=_PRODUCER,
        find="FOLDS_PACKED ? QK_CHUNKS * CHUNK_BYTES * rows_of_box(p) : QGroup::BYTES;",
        replace="QGroup::BYTES;",
        caught_by="deadlock",
    ),
    Plant(
        name="packed-rows-not-cleared",
        title="rows that no box brings are what they were",
        file="fwd_sm90/attn_fwd_sm90.cuh",
        find="  if constexpr (FOLDS_PACKED) clear_rows_of_nobody(params.attn, smem.q);",
        replace="",
        caught_by="uninitialized-read",
    ),
    Plant(
        name="packed-clear-no-fence",
        title="products may read those rows before the zeros",
        file=_PRODUCER,
        find="  fence_proxy_async();",
        replace="",
        caught_by="missing-fence",
    ),
)
