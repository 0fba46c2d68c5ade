"""This module plants bugs in how a block of the portable kernel goes from piece to piece, of packed
sequences too, and in how it widens 8-bit caches; see plants.py
(tests/plants/test_sim_plants_stream_k.py, test_sim_plants_folded.py and
test_sim_plants_float8.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name
from flashcore.sim.plants.fwd_sm90 import packed
from flashcore.sim.plants.fwd_sm90.split import PLANTS_STREAM

_KERNEL = "fwd_wmma/attn_fwd_wmma.cuh"
_FLOAT8 = "fwd_wmma/float8_wmma.cuh"

PLANTS_PIECES_WMMA = by_name(
    Plant(
        name="piece-not-handed-on",
        title="a piece begins before its place is known, and the last one's tiles are read",
        file=_KERNEL,
        find="    block_sync();  // hands the walk on;",
        replace="    //",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="piece-moved-on-early",
        title="the walk moves on while other warps still look where their piece is",
        file=_KERNEL,
        find="    block_sync();  // orders all reads of the walk before it moves on",
        replace="",
        caught_by="race",
    ),
    Plant(
        name="piece-of-all-keys",
        title="a piece has all keys of its row tile",
        file=_KERNEL,
        find="  const Range keys = own_keys(p, block);",
        replace="  const Range keys = key_tiles(p, block.m_begin);",
        caught_by="wrong-result",
    ),
)

OF_WALK = PLANTS_STREAM | PLANTS_PIECES_WMMA

_ROWS = "tile/rows.cuh"

PLANTS_PACKED_WMMA = by_name(
    Plant(
        name="packed-row-tile-forgotten",
        title="the walk forgets which row tile of a sequence is next",
        file="tile/stream_k.cuh",
        find="    if (PACKED) m_block = smem_load(from + 7);",
        replace="",
        caught_by="double-write",
        or_by=("uninitialized-read", "unwritten-output", "counter-left"),
    ),
    Plant(
        name="packed-q-of-one-head",
        title="all rows of a query have the q of the first head",
        file=_ROWS,
        find="(query + head_of(p, own) * p.strides.q.head + col);",
        replace="(query + col);",
        caught_by="wrong-result",
    ),
    Plant(
        name="packed-q-row-by-row",
        title="rows of a tile are queries of one head",
        file=_ROWS,
        find="query_of(p, own) * int64_t(p.strides.q.row);",
        replace="own * int64_t(p.strides.q.row);",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="packed-totals-left-out",
        title="of a piece that is longer than a chunk the last chunk counts",
        file=_KERNEL,
        find="  totals.end(state, out, scale_log2);",
        replace="  if (!STREAM_K) totals.end(state, out, scale_log2);",
        caught_by="wrong-result",
    ),
)
OF_PACKED = packed.PLANTS_PACKED | PLANTS_PACKED_WMMA
# The sequence of no query has so many keys that rules have keys cut, and heads folded. Nobody reads
# them, so the three blocks have the pieces of packed.CALL, of up to 16 key tiles, four a chunk.
PACKED_CALL: dict[str, Any] = packed.CALL | {"lengths_k": (1900, 500, 700, 40)}
PACKED_TILE: dict[str, Any] = packed.TILE | {"keys_of_chunk": 128}

PLANTS_FLOAT8_WMMA = by_name(
    Plant(
        name="widened-early",
        title="a tile is widened while other warps read the one before",
        file=_KERNEL,
        find="    block_sync();  // orders every thread's arrived copies",
        replace="    if (!FLOAT8) block_sync();  // orders every thread's arrived copies",
        caught_by="race",
    ),
    Plant(
        name="widened-not-awaited",
        title="a tile is read before all warps have widened their parts of it",
        file=_KERNEL,
        find="      block_sync();  // orders all threads' widened elements before the reads below",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="widened-next-stage",
        title="the bytes of the next key tile are widened",
        file=_KERNEL,
        find="      const int loaded = n_block % NUM_STAGES;",
        replace="      const int loaded = (n_block + 1) % NUM_STAGES;",
        caught_by="async-pending",
        or_by=("uninitialized-read", "race", "wrong-result"),
    ),
    Plant(
        name="widened-without-sign",
        title="elements below 0 lose their sign",
        file=_FLOAT8,
        find="(apart & 0x00800080u) << 8 | magnitude << SHIFT;",
        replace="magnitude << SHIFT;",
        caught_by="wrong-result",
    ),
    Plant(
        name="widened-in-exchange",
        title="the two elements of a pair change places",
        file=_FLOAT8,
        find="widen2_by_integers<T>((two & 0xffu) | (two & 0xff00u) << 8);",
        replace="widen2_by_integers<T>((two & 0xffu) << 16 | (two & 0xff00u) >> 8);",
        caught_by="wrong-result",
    ),
)

# The call that shows those of 8-bit caches.
CALL: dict[str, Any] = {
    "lengths": (150, 90),
    "page_size": 16,
    "seqlen_q": 3,
    "num_heads_q": 2,
    "num_heads_kv": 2,
    "cache_dtype": "float8_e4m3fn",
    "seed": 2,
}
TILE: dict[str, Any] = {"block_m": 64, "block_n": 32, "num_stages": 2}
