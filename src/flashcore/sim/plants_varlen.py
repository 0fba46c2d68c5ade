"""Planted bugs of what sequences of different lengths add to the kernels; see plants.py
(tests/test_sim_plants_varlen.py)."""

from __future__ import annotations

from flashcore.sim.plants import Plant

_SEQUENCE = "tile/sequence.cuh"

_ALL = (
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
        find="own.v = p.v + int64_t(keys.begin) * p.v_row_stride;",
        replace="own.v = p.v;",
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

PLANTS_VARLEN: dict[str, Plant] = {plant.name: plant for plant in _ALL}
