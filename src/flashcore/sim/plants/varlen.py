"""This module plants bugs in what sequences of different lengths add to the kernels; see plants.py
(tests/plants/test_sim_plants_varlen.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_SEQUENCE = "tile/sequence.cuh"
_SCHEDULE = "tile/schedule_varlen.cuh"

_PORTABLE = (
    Plant(
        name="neighbours-query",
        title="a row of the next sequence is computed and stored, too",
        file=_SEQUENCE,
        find="own.seqlen_q = queries.count;",
        replace="own.seqlen_q = queries.count + 1;",
        caught_by="double-write",
        or_by=("out-of-bounds",),  # behind the last sequence
    ),
    Plant(
        name="neighbours-key",
        title="the first key of the next sequence is seen",
        file=_SEQUENCE,
        find="own.seqlen_k = keys.count;",
        replace="own.seqlen_k = keys.count + (keys.count > 0 ? 1 : 0);",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="tile-search",
        title="the search for a tile's sequence ends one sequence too early",
        file=_SEQUENCE,
        find="const bool left = number < first",
        replace="const bool left = number <= first",
        caught_by="out-of-bounds",
        or_by=("double-write", "unwritten-output"),
    ),
    Plant(
        name="tile-numbers",
        title="sequences that share a row tile's worth of rows share its number",
        file=_SEQUENCE,
        find="return begin / BLOCK_M + sequence;",
        replace="return begin / BLOCK_M + (sequence > p.batch ? sequence : 0);",
        caught_by="unwritten-output",
    ),
    Plant(
        name="values-of-the-first",
        title="every sequence takes the values of the first one",
        file=_SEQUENCE,
        find="own.tensors.v = p.tensors.v + int64_t(keys.begin) * p.strides.v.row;",
        replace="own.tensors.v = p.tensors.v;",
        caught_by="wrong-result",
    ),
    Plant(
        name="no-clamp",
        title="a sequence's end is believed, wherever it is",
        file=_SEQUENCE,
        find="end = clamp_i(gmem_load(cu_seqlens + (sequence + 1)), 0, total);",
        replace="end = gmem_load(cu_seqlens + (sequence + 1));",
        caught_by="out-of-bounds",
    ),
)

PLANTS_VARLEN = by_name(*_PORTABLE)

_SM90 = (
    Plant(
        name="box-of-a-neighbour",
        title="boxes of Q and O end one row late, so that a row of the next sequence is stored",
        file=_SEQUENCE,
        find="return {p.lengths.total_q - rows.count, rows.begin + rows.count};",
        replace="return {p.lengths.total_q - rows.count - 1, rows.begin + rows.count + 1};",
        caught_by="double-write",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="values-off-by-one",
        title="boxes of keys and values start one row late",
        file=_SEQUENCE,
        find="return {p.lengths.total_k - rows.count, rows.begin + rows.count};",
        replace="return {p.lengths.total_k - rows.count, rows.begin + rows.count + 1};",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="scan",
        title="the prefix sum is over the tiles of one head",
        file=_SCHEDULE,
        find="tiles = warp_scan(num_tiles * num_heads(p));",
        replace="tiles = warp_scan(num_tiles);",
        caught_by="unwritten-output",
        or_by=("mbarrier", "race", "double-write"),
    ),
    Plant(
        name="class-left-out",
        title="sequences whose length is a power of two of tiles are in no class",
        file=_SCHEDULE,
        find="const bool longest = walked > 1 << length_class;",
        replace="const bool longest = walked >= 1 << length_class;",
        caught_by="unwritten-output",
    ),
    Plant(
        name="counter-left",
        title="the counter is not put back for the next launch",
        file=_SCHEDULE,
        find="gmem_atomic_add(p.tile_counter, -walk.before);",
        replace="",
        caught_by="counter-left",
    ),
    Plant(
        name="feed-not-waited-for",
        title="the scheduler writes the next tile's coordinates before it is asked",
        file=_SCHEDULE,
        find="  mbar_wait(feed.asked, count % 2);",
        replace="",
        caught_by="race",
        or_by=("mbarrier", "deadlock"),  # two phases at once, of which the producer sees none
    ),
    Plant(
        name="feed-asked-early",
        title="the next tile is asked for before this one's coordinates have been read",
        file=_SCHEDULE,
        find="    const auto coord = smem_load_packet<16>(feed.coord);",
        replace="    mbar_arrive(feed.asked); const auto coord = smem_load_packet<16>(feed.coord);",
        caught_by="race",
        or_by=("mbarrier",),
    ),
)

PLANTS_VARLEN_SM90 = by_name(*_SM90)
