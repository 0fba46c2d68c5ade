"""This module plants bugs in the code for keys that are split over blocks, by the host or
(stream-K) by the device; see plants.py (tests/plants/test_sim_plants_split.py and
test_sim_plants_stream_k.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name

_SPLIT = "tile/shares.cuh"

_ALL = (
    Plant(
        name="split-relaxed",
        title="shares are counted by an atomic that orders nothing",
        file=_SPLIT,
        find="gmem_atomic_add_acq_rel(counter, 1) ==",
        replace="gmem_atomic_add(counter, 1) ==",
        caught_by="race",
    ),
    Plant(
        name="split-no-barrier",
        title="a share is counted when one warp has written its rows of it",
        file=_SPLIT,
        find="  sync();  // orders all",
        replace="  // orders all",
        caught_by="race",
    ),
    Plant(
        name="split-arrival-not-awaited",
        title="warps look whether theirs was the last share before that is known",
        file=_SPLIT,
        find="  sync();  // hands on",
        replace="  // hands on",
        caught_by="race",
        or_by=("uninitialized-read",),  # in a block's first row tile
    ),
    Plant(
        name="split-last-too-early",
        title="the last share but one is taken for the last",
        file=_SPLIT,
        find="gmem_atomic_add_acq_rel(counter, 1) == num_splits - 1;",
        replace="gmem_atomic_add_acq_rel(counter, 1) == num_splits - 2;",
        caught_by="uninitialized-read",
    ),
    Plant(
        name="split-never-last",
        title="no share is taken for the last",
        file=_SPLIT,
        find="gmem_atomic_add_acq_rel(counter, 1) == num_splits - 1;",
        replace="gmem_atomic_add_acq_rel(counter, 1) == num_splits;",
        caught_by="unwritten-output",
    ),
    Plant(
        name="split-counter-left",
        title="the counter is not put back for the next launch",
        file=_SPLIT,
        find="    if (last) gmem_atomic_add(counter, -num_splits);",
        replace="",
        caught_by="counter-left",
    ),
    Plant(
        name="split-one-counter",
        title="the row tiles of a head share a counter",
        file=_SPLIT,
        find="const int row_tile = head * p.num_m_blocks + block.m_begin / BLOCK_M;",
        replace="const int row_tile = head * p.num_m_blocks;",
        caught_by="uninitialized-read",
        or_by=("unwritten-output", "race"),
    ),
    Plant(
        name="split-share-dropped",
        title="the first share does not count",
        file=_SPLIT,
        find="        const float weight = exp2_approx(",
        replace="        const float weight = begin + s == 0 ? 0.0f : exp2_approx(",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-without-weight",
        title="shares are added as if their maxima were the same",
        file=_SPLIT,
        find="exp2_approx((stats[s][i].row_max - finite_max) * scale_log2);",
        replace="1.0f;",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-sums-not-rescaled",
        title="a later share's larger maximum does not change the sums so far",
        file=_SPLIT,
        find="      const float factor = exp2_approx((old_max - finite_max) * scale_log2);",
        replace="      const float factor = 1.0f;",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-last-share-again",
        title="the last share is added again for those that there are not",
        file=_SPLIT,
        find="        if (begin + s >= num_splits) continue;",
        replace="",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-gap",
        title="key tiles that do not divide evenly are in no piece",
        file="fwd_sm90/split_sm90.cuh",
        find="at_least + (block.split < one_more ? 1 : 0);",
        replace="at_least;",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-rows-past-the-end",
        title="rows that do not exist have a share, too",
        file=_SPLIT,
        find="    if (!is_row(p, row)) continue;",
        replace="",
        caught_by="double-write",  # by the next head
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="split-later-piece-known",
        title="the place of a later piece is read before it comes with Q",
        file="fwd_sm90/attn_fwd_sm90.cuh",
        find="const bool is_known = KNOWS_FIRST_PIECE && turn == 0;",
        replace="const bool is_known = KNOWS_FIRST_PIECE;",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
)

PLANTS_SPLIT = by_name(*_ALL)

_STREAM_K = "tile/stream_k.cuh"

_OF_STREAM_K = (
    Plant(
        name="stream-range-short",
        title="ranges are too short, so that the line's end is in none",
        file=_STREAM_K,
        find="(total + num_ranges - 1) / num_ranges);",
        replace="(total - 1) / num_ranges);",
        caught_by="unwritten-output",
        or_by=("counter-left",),
    ),
    Plant(
        name="stream-border-tile-twice",
        title="a range ends one key tile late, so that two blocks take that tile",
        file=_STREAM_K,
        find="    end = min_i(line.total, place + range_tiles);",
        replace="    end = min_i(line.total, place + range_tiles + 1);",
        caught_by="wrong-result",
        or_by=("double-write", "race", "counter-left", "uninitialized-read"),
    ),
    Plant(
        name="stream-border-tile-lost",
        title="the last key tile of a range is left out where the row tile goes on",
        file=_STREAM_K,
        find="block.tile_end = min_i(end, first + num_tiles) - first;",
        replace="block.tile_end = (end < first + num_tiles ? end - 1 : first + num_tiles) - first;",
        caught_by="wrong-result",
    ),
    Plant(
        name="stream-one-slot",
        title="a block has one slot for both of its shares",
        file=_STREAM_K,
        find="(first % range_tiles == 0 ? 0 : 1);",
        replace="0;",
        caught_by="race",
        or_by=("double-write", "wrong-result"),
    ),
    Plant(
        name="stream-slot-of-the-next-row-tile",
        title="a row tile's later shares go where the block's last share goes",
        file=_STREAM_K,
        find="(block.first_slot / 2 + split * p.splits.num_lines) * 2;",
        replace="(block.first_slot / 2 + split * p.splits.num_lines) * 2 + 1;",
        caught_by="race",
        or_by=("double-write", "wrong-result"),
    ),
    Plant(
        name="stream-counter-of-the-last-block",
        title="each block counts its shares for itself",
        file=_STREAM_K,
        find="first_block_of(const BlockCoord& block) { return block.first_slot / 2; }",
        replace="first_block_of(const BlockCoord&) { return block_idx(); }",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="stream-counter-left",
        title="a row tile's counter is put back by a share too few",
        file=_SPLIT,
        find="    if (last) gmem_atomic_add(counter, -num_splits);",
        replace="    if (last) gmem_atomic_add(counter, 1 - num_splits);",
        caught_by="counter-left",
    ),
    Plant(
        name="stream-end-on-a-border",
        title="a row tile that ends where a range does waits for a share of the next block",
        file=_STREAM_K,
        find="    block.num_splits = (first + num_tiles - 1) / range_tiles - first_range + 1;",
        replace="    block.num_splits = (first + num_tiles) / range_tiles - first_range + 1;",
        caught_by="unwritten-output",
        or_by=("counter-left",),
    ),
    Plant(
        name="stream-heads-not-counted",
        title="the line has one head of each sequence",
        file=_STREAM_K,
        find="    const WarpScan line = warp_scan(sum * heads);",
        replace="    const WarpScan line = warp_scan(sum);",
        caught_by="unwritten-output",
        or_by=("wrong-result", "double-write", "counter-left"),
    ),
    Plant(
        name="stream-head-kept",
        title="the next sequence's heads are counted on from the last one's",
        file=_STREAM_K,
        find="    head = 0;\n    num_tiles = 0;",
        replace="\n    num_tiles = 0;",
        caught_by="out-of-bounds",
        or_by=("unwritten-output", "double-write"),
    ),
    Plant(
        name="stream-empty-left-out",
        title="sequences without a key have no place in the line",
        file=_STREAM_K,
        find="take(m_block, max_i(1, keys.end - keys.begin))",
        replace="take(m_block, keys.end - keys.begin)",
        caught_by="unwritten-output",
    ),
    Plant(
        name="stream-whole-not-divided",
        title="rows that one block has alone are not divided by their sums",
        file=_SPLIT,
        find="to_packet(pack2<Element>(x[i] * inverse_sum[r],",
        replace="to_packet(pack2<Element>(x[i],",
        caught_by="wrong-result",
    ),
    Plant(
        name="stream-whole-past-the-end",
        title="rows that do not exist are written where one block has a row tile alone",
        file=_SPLIT,
        find="    if (!is_row(p, row)) break;",
        replace="",
        caught_by="double-write",  # by the next head
        or_by=("out-of-bounds",),
    ),
)

# The call that shows them: two heads, of 1 + 1 + 34 key tiles each, for three blocks of 24. So a
# row tile is cut twice, in the second block the tail of one comes before the head of the next, and
# the last ends with a range.
STREAM_CASE: dict[str, Any] = {
    "lengths": (0, 5, 1070),
    "page_size": 32,
    "seqlen_q": 2,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "head_dim": 32,
    "head_dim_v": 40,
}
STREAM_TILE: dict[str, Any] = {
    "block_m": 64,
    "block_n": 32,
    "num_stages": 2,
    "min_blocks": 1,
    "stream_k": True,
}

PLANTS_STREAM = by_name(*_OF_STREAM_K)
