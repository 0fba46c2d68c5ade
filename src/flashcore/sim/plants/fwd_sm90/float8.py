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
# Warps that share the keys of few rows: several key tiles, and row tiles of a block; of 16 rows,
# and of 17 under a bound.
FEW_TILE: dict[str, Any] = {"block_n": 64, "num_stages": 2, "num_splits": 1, "stream_k": False}
GROWN_CALL = CALL | {"scale": 1.0}  # scores that differ by far more than 2^10 allows
ROWS_CALL = CALL | {"seqlen_q": 17, "lengths": (90, 40), "causal": "lower_right"}
_FLOAT8 = "fwd_sm90/float8/float8_sm90.cuh"
_SEQUENCE = "tile/sequence.cuh"
_PRODUCER = "fwd_sm90/producer_sm90.cuh"
_PIPELINE = "fwd_sm90/pipeline_sm90.cuh"
_FEW = "fwd_sm90/float8/few_rows_sm90.cuh"

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
        name="few-columns-as-wgmma",
        title="Q's columns are in another order than K's",
        file=_FLOAT8,
        find="FEW_ROWS ? lane % 4 * 4 + i / 4 * 2 : accum_col(lane, i);",
        replace="accum_col(lane, i);",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-bytes-in-place",
        title="two columns of one value count as one column of two values",
        file=_FEW,
        find="COLUMNS_APART = 0x3120;",
        replace="COLUMNS_APART = 0x3210;",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-unswizzled",
        title="bytes are read without the swizzle that TMA wrote them with",
        file=_FEW,
        find="swizzled_col<Tile::ROW_BYTES>(lane % 8,",
        replace="swizzled_col<Tile::ROW_BYTES>(0,",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-sums-not-awaited",
        title="the first warp adds up before the others have written",
        file=_FEW,
        find="  named_barrier_sync(barrier, 128);  // hands the writes above on to the first warp",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="few-sums-overwritten",
        title="a warp writes what it has while the first one still reads the row tile before",
        file=_FEW,
        find="  named_barrier_sync(barrier, 128);  // orders reads of the row tile before ahead",
        replace="  // orders reads of the row tile before ahead",
        caught_by="race",
    ),
    Plant(
        name="few-sums-unweighted",
        title="sums of warps with other maxima count alike",
        file=_FEW,
        find="c.softmax.row_sum[r] += weight[w] * sum[w];",
        replace="c.softmax.row_sum[r] += sum[w];",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-sums-of-every-lane",
        title="the four lanes of a row have its whole sum each",
        file=_FEW,
        find="    if (lane % 4 != 0) c.softmax.row_sum[r] = 0.0f;  // lanes have shares of it",
        replace="",
        caught_by="wrong-result",
    ),
)
PLANTS_ROWS_SM90 = by_name(
    Plant(
        name="few-rows-eight",
        title="rows 8 to 15 count as nobody's",
        file=_FEW,
        find="    c.has_upper = first_row + 8 < own.seqlen_q;",
        replace="    c.has_upper = false;",
        caught_by="wrong-result",
    ),
    Plant(
        name="few-rows-of-the-first",
        title="the second warp of rows sees the keys that the first one's rows see",
        file=_FEW,
        find="hide_scores(made, p, row_begin + strip_idx() * 16, key_begin);",
        replace="hide_scores(made, p, row_begin, key_begin);",
        caught_by="wrong-result",
    ),
)
PLANTS_GROWN_SM90 = by_name(
    Plant(
        name="few-max-outgrown",
        title="a warp goes on with old maxima that scores have outgrown, or that are none",
        file=_FEW,
        find="    if (!warp_any(has_outgrown(tile_sum, max_log2))) {",
        replace="    if (true) {",
        caught_by="wrong-result",
    ),
)
# With the tile and the call that show them.
GROUPS = (
    (PLANTS_FLOAT8_SM90, TILE, CALL),
    (PLANTS_WIDE_SM90, TILE, WIDE_CALL),
    (PLANTS_SHORT_SM90, TILE, SHORT_CALL),
    (PLANTS_FEW_SM90, FEW_TILE, CALL),
    (PLANTS_ROWS_SM90, FEW_TILE, ROWS_CALL),
    (PLANTS_GROWN_SM90, FEW_TILE, GROWN_CALL),
)
