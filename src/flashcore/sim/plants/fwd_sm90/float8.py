"""This module plants bugs in how keys and values of 8 bits become operands; see plants.py
(tests/plants/test_sim_plants_float8.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name

# The call that shows them: many key tiles for few stages; bfloat16, as Q is multiplied there; a
# scale for each sequence.
CALL: dict[str, Any] = {
    "lengths": (150, 90),
    "page_size": 16,
    "seqlen_q": 3,
    "num_heads_q": 2,
    "num_heads_kv": 2,
    "dtype": "bfloat16",
    "cache_dtype": "float8_e4m3fn",
    "seed": 2,
}
WIDE_CALL = CALL | {"head_dim": 144, "head_dim_v": 32}  # Q stays in shared memory
# One key tile, and several row tiles a block: nothing else lies between Q and the next one.
SHORT_CALL = CALL | {"lengths": (20, 9, 17, 30)}
TILE: dict[str, Any] = {
    "block_m": 64,
    "block_n": 32,
    "num_stages": 2,
    "load_stages": 2,
    "strips": 0,
}
# Warps that share the keys of few rows: several key tiles, and row tiles of a block; of 3 rows, and
# of 17 under a bound, of which a warp has 16.
FEW_TILE: dict[str, Any] = {"block_n": 128, "num_stages": 2, "num_splits": 1, "stream_k": False}
FEW_CALL = CALL | {"lengths": (300, 150)}
ROWS_TILE = FEW_TILE | {"block_n": 64}
STAGES_TILE = FEW_TILE | {"num_stages": 4}  # more than Q has buffers: K's order says nothing of Q's
GROWN_CALL = FEW_CALL | {"scale": 4.0}  # scores that differ by far more than 2^10 allows
ROWS_CALL = CALL | {"seqlen_q": 17, "lengths": (90, 40), "causal": "lower_right"}
_FLOAT8 = "fwd_sm90/float8/float8_sm90.cuh"
_SEQUENCE = "tile/sequence.cuh"
_PRODUCER = "fwd_sm90/producer_sm90.cuh"
_PIPELINE = "fwd_sm90/pipeline_sm90.cuh"
_FEW = "fwd_sm90/float8/few_rows_sm90.cuh"
_STRIPS = "fwd_sm90/float8/strips_sm90.cuh"

PLANTS_FLOAT8_SM90 = by_name(
    Plant(
        name="float8-no-full-wait",
        title="bytes are converted before they have arrived",
        file=_FLOAT8,
        find="    mbar_wait(c.load_full + load.stage(), load.parity());",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read", "async-pending"),
    ),
    Plant(
        name="float8-no-empty-wait",
        title="a tile is written while consumers may still read the one that was there",
        file=_FLOAT8,
        find="    mbar_wait(c.empty + state.stage(), state.parity() ^ 1);",
        replace="",
        caught_by="race",
        or_by=("mbarrier",),
    ),
    Plant(
        name="float8-no-fence",
        title="no proxy fence between the conversion and the products that read the tile",
        file=_FLOAT8,
        find="    fence_proxy_async();\n    warp_sync();",
        replace="\n    warp_sync();",
        caught_by="missing-fence",
        or_by=("race",),
    ),
    Plant(
        name="float8-lanes-ahead",
        title="the first lane says that a tile is converted while others still write",
        file=_FLOAT8,
        find="    warp_sync();  // orders all lanes' accesses before the first one's arrivals",
        replace="",
        caught_by="race",
        or_by=("missing-fence", "uninitialized-read"),
    ),
    Plant(
        name="float8-end-unsaid",
        title="the warps that convert are not told of the end",
        file=_PRODUCER,
        find="      if (CONVERTS && leads) end_conversion(bar, smem, k_states[0], v_states[0]);",
        replace="",
        caught_by="deadlock",
    ),
    Plant(
        name="float8-one-warp-counted",
        title="a tile counts as converted when the first of its warps is done",
        file=_PIPELINE,
        find="mbar_init(bar.v_full + stage, CONVERTS ? CONVERTING_WARPS : 1);",
        replace="mbar_init(bar.v_full + stage, 1);",
        caught_by="deadlock",  # the second warp's arrival counts for the next phase
        or_by=("race", "mbarrier"),
    ),
    Plant(
        name="float8-unswizzled",
        title="converted rows are written without the swizzle that WGMMA expects",
        file=_FLOAT8,
        find="smem_store_packet(tile.at(row, col), converted);",
        replace="smem_store_packet(tile.chunk(col / CHUNK) + (row * CHUNK + col % CHUNK), "
        "converted);",
        caught_by="wrong-result",
    ),
    Plant(
        name="float8-scale-of-the-first",
        title="all sequences have the scale of the first one's keys",
        file=_SEQUENCE,
        find="s.k_scale + (sequence * s.k_scale_batch +",
        replace="s.k_scale + (0 * s.k_scale_batch +",
        caught_by="wrong-result",
    ),
    Plant(
        name="float8-factor-kept",
        title="what Q was multiplied by stays in the maxima",
        file="fwd_sm90/attn_fwd_sm90.cuh",
        find="      c.softmax.row_max[0] *= of_products;",
        replace="",
        caught_by="wrong-result",
    ),
)
PLANTS_WIDE_SM90 = by_name(
    Plant(
        name="float8-queries-ahead",
        title="products begin before all warps have converted their rows of Q",
        file=_FLOAT8,
        find="    named_barrier_sync(barrier, 128);  // hands all warps' rows on to products",
        replace="",
        caught_by="race",
        or_by=("missing-fence",),
    ),
)
PLANTS_SHORT_SM90 = by_name(
    Plant(
        name="float8-queries-given-back",
        title="the first lane gives Q back while others still read it",
        file=_FLOAT8,
        find="    warp_sync();  // orders all lanes' reads before the first one gives Q back",
        replace="",
        caught_by="race",
    ),
)
PLANTS_FEW_SM90 = by_name(
    Plant(
        name="few-keys-not-awaited",
        title="a warp reads K's bytes before they have arrived",
        file=_FEW,
        find="  mbar_wait(bar.k_full + stage, parity);",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read", "async-pending"),
    ),
    Plant(
        name="few-values-not-awaited",
        title="a warp reads V's bytes before they have arrived",
        file=_FEW,
        find="  mbar_wait(bar.v_full + stage, parity);",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read", "async-pending"),
    ),
    Plant(
        name="few-keys-given-back",
        title="the first lane gives K back while others still read it",
        file=_FEW,
        find="  warp_sync();  // orders all lanes' reads before the first one's arrival",
        replace="",
        caught_by="race",
        or_by=("async-pending",),
    ),
    Plant(
        name="few-keys-of-the-first",
        title="all warps take the first one's keys",
        file=_FEW,
        find="  const int first_row = key_warp() * WARP_KEYS;",
        replace="  const int first_row = 0;",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-keys-side-by-side",
        title="keys 8 to 15 of a product change places with columns of the first ones",
        file=_STRIPS,
        find="  a.reg[1] = of_second[0];\n  a.reg[2] = of_first[1];",
        replace="  a.reg[2] = of_second[0];\n  a.reg[1] = of_first[1];",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-probabilities-as-scores",
        title="P is an operand as scores come, keys for rows",
        file=_STRIPS,
        find="transpose8x8(pack2<MathElement>(x[at], x[at + 2]));",
        replace="pack2<MathElement>(x[at], x[at + 2]);",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-bytes-in-place",
        title="two columns of one value count as one column of two values",
        file=_STRIPS,
        find="COLUMNS_APART = 0x3120;",
        replace="COLUMNS_APART = 0x3210;",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-unswizzled",
        title="bytes are read without the swizzle that TMA wrote them with",
        file=_STRIPS,
        find="swizzled_col<Tile::ROW_BYTES>(lane % 8,",
        replace="swizzled_col<Tile::ROW_BYTES>(0,",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-sums-not-awaited",
        title="a warp adds up before the others have written",
        file=_FEW,
        find="    sync();  // hands the writes on to all warps",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="few-sums-overwritten",
        title="a warp writes what it has while others still add up the row tile before",
        file=_FEW,
        find="    sync();  // orders reads of the row tile before ahead of these writes",
        replace="",
        caught_by="race",
    ),
    Plant(
        name="few-sums-unweighted",
        title="sums of warps with other maxima count alike",
        file=_FEW,
        find="    row_sum += weight * sum[w];",
        replace="    row_sum += sum[w];",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-sums-of-one-lane",
        title="one of the eight lanes that have a row's keys says the whole sum",
        file=_FEW,
        find="sum_of_lanes(c.strip[s].softmax.row_sum[r]);",
        replace="c.strip[s].softmax.row_sum[r];",
        caught_by="wrong-result",
    ),
)
PLANTS_ROWS_SM90 = by_name(
    Plant(
        name="few-rows-eight",
        title="the second strip of a warp has the first one's queries",
        file=_FEW,
        find="load_strip(strip, smem.q[slot], warp_row + s * STRIP_ROWS);",
        replace="load_strip(strip, smem.q[slot], warp_row);",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-rows-of-the-first",
        title="a warp's second strip sees the keys that the first one's rows see",
        file=_FEW,
        find="hide_strip(made[s], p, warp_row + s * STRIP_ROWS, key_begin);",
        replace="hide_strip(made[s], p, warp_row, key_begin);",
        caught_by="wrong-result",
    ),
)
PLANTS_FEW_SHORT_SM90 = by_name(
    Plant(
        name="few-queries-given-back",
        title="the first lane gives Q back while others still read it",
        file=_FEW,
        find="    warp_sync();  // orders all lanes' reads before the first one gives Q back",
        replace="",
        caught_by="race",
    ),
)
PLANTS_GROWN_SM90 = by_name(
    Plant(
        name="few-max-outgrown",
        title="a warp goes on with old maxima that scores have outgrown, or that are none",
        file=_FEW,
        find="    if (!warp_any(outgrown)) {",
        replace="    if (true) {",
        caught_by="wrong-result",
    ),
)
# With the tile and the call that show them.
GROUPS = (
    (PLANTS_FLOAT8_SM90, TILE, CALL),
    (PLANTS_WIDE_SM90, TILE, WIDE_CALL),
    (PLANTS_SHORT_SM90, TILE, SHORT_CALL),
    (PLANTS_FEW_SM90, FEW_TILE, FEW_CALL),
    (PLANTS_ROWS_SM90, ROWS_TILE, ROWS_CALL),
    (PLANTS_FEW_SHORT_SM90, STAGES_TILE, SHORT_CALL),
    (PLANTS_GROWN_SM90, FEW_TILE, GROWN_CALL),
)
