"""This module plants bugs in how the Hopper kernel's row tiles come and go: when the first may be
loaded, how consumers learn of them, and how shares of their keys are added up; part of
plants_sm90.py."""

from __future__ import annotations

from flashcore.compile.plant import Plant

_KERNEL = "fwd_sm90/attn_fwd_sm90.cuh"
_MERGE = "fwd_sm90/split_sm90.cuh"
_COORD_BEFORE_ARRIVAL = """\
    if (!is_known && places) store_coord(coord, block);
    // In the order of use: Q K^T of a tile is issued before P V of the tile visited before it. The
    // first K's stage is free before Q's buffer is.
    int n_block = keys.end - 1;
    if (PAGED) pages.begin(own, block, keys, n_block);
    load_keys(block, keys, n_block);
    for (int group = 0; places && group < NUM_ROW_GROUPS; ++group) {
      const int slot = q_slot(turn, group);
      const auto full = bar.q_full + slot;
      mbar_wait(bar.q_empty + slot, q_parity(turn) ^ 1);
      mbar_arrive_expect_tx(full, bytes_of_box(p));
"""
_TAKEN_BEFORE_STORE = """\
    mbar_wait(bar.merge_empty, turn % 2 ^ 1);  // of the last row tile's
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      smem_store(mine + r * 128, softmax.row_max[r]);
      smem_store(mine + (r + 2) * 128, softmax.row_sum[r]);
    }
"""
_SHARED_KEYS = {
    "block_m": 64,
    "min_blocks": 1,
    "key_slices": 2,
    "num_stages": 4,
    "ping_pong": False,
}

ROW_TILE_PLANTS = (
    Plant(
        name="early-consumers",
        title="only the producer waits for the kernels before this one",
        file=_KERNEL,
        find="  grid_dependency_wait();",
        replace="  if (warp_idx() < 4) grid_dependency_wait();",
        caught_by="early-access",
    ),
    Plant(
        name="early-loads",
        title="the producer waits for the kernels before this one behind its loads",
        file=_KERNEL,
        find="""\
  grid_dependency_wait();

  if (warp_idx() < 4) {
    lower_registers<PRODUCER_REGISTERS>();
    if (warp_idx() < LOADERS && (WHOLE_WARP || elect_lane())) produce(params, bar, smem);
""",
        replace="""\
  if (warp_idx() >= 4) grid_dependency_wait();

  if (warp_idx() < 4) {
    lower_registers<PRODUCER_REGISTERS>();
    if (warp_idx() == 0 && elect_lane()) produce(params, bar, smem), grid_dependency_wait();
""",
        caught_by="early-access",
    ),
    Plant(
        name="q-of-another-group",
        title="all consumers wait for the first one's rows of Q",
        file=_KERNEL,
        find="    if (!is_known) mbar_wait(bar.q_full + c.q_slot, q_parity(turn));",
        replace="    if (!is_known) mbar_wait(bar.q_full + q_slot(turn, 0), q_parity(turn));",
        caught_by="race",
        plan={"block_m": 128, "min_blocks": 1, "key_slices": 1, "num_stages": 2},
    ),
    Plant(
        name="q-buffers-in-step",
        title="the phases of two buffers for Q are counted as if there were one",
        file="fwd_sm90/pipeline_sm90.cuh",
        find="return turn / Q_BUFFERS % 2; }",
        replace="return turn % 2; }",
        caught_by="race",
        or_by=("deadlock", "mbarrier", "uninitialized-read"),
        plan={"q_buffers": 2},
    ),
    Plant(
        name="coord-slots",
        title="two slots for the coordinates of row tiles, of which three are under way",
        file="fwd_sm90/schedule_sm90.cuh",
        find="  return coords + turn % COORD_SLOTS * COORD_INTS;",
        replace="  return coords + turn % 2 * COORD_INTS;",
        caught_by="race",
        plan={"num_stages": 4},  # or the producer waits for a stage, and with that long enough
    ),
    Plant(
        name="coord-late",
        title="a row tile's coordinates are written when consumers may have looked",
        file="fwd_sm90/producer_sm90.cuh",
        find=_COORD_BEFORE_ARRIVAL,
        replace=_COORD_BEFORE_ARRIVAL.replace(
            "    if (!is_known && places) store_coord(coord, block);", ""
        ).replace("_box(p));", "_box(p)); if (group == 0) store_coord(coord, block);"),
        caught_by="race",
    ),
    Plant(
        name="share-not-awaited",
        title="shares of the keys are added up before the other one is there",
        file=_MERGE,
        find="  mbar_wait(bar.merge_full, turn % 2);",
        replace="",
        caught_by="uninitialized-read",
        or_by=("race",),  # when the other one came first
        plan=_SHARED_KEYS,
    ),
    Plant(
        name="share-overwritten",
        title="a share is handed over while the last row tile's may still be read",
        file=_MERGE,
        find=_TAKEN_BEFORE_STORE,
        replace=_TAKEN_BEFORE_STORE.partition("\n")[1]
        + _TAKEN_BEFORE_STORE.partition("\n")[2][:-1]
        + " mbar_wait(bar.merge_empty, turn % 2 ^ 1);\n",
        caught_by="race",
        plan=_SHARED_KEYS,
    ),
    Plant(
        name="share-never-taken",
        title="the first share waits for one before it to be taken",
        file=_MERGE,
        find="turn % 2 ^ 1);  // of the last",
        replace="turn % 2);  // of the last",
        caught_by="deadlock",
        plan=_SHARED_KEYS,
    ),
    Plant(
        name="shares-on-one-ring",
        title="consumers that share keys take them from one ring of stages",
        file=_KERNEL,
        find="  c.k_state.ring = slice;",
        replace="",
        caught_by="race",
        plan=_SHARED_KEYS,
    ),
    Plant(
        name="share-without-weight",
        title="the other share's output is added as if the maxima were the same",
        file=_MERGE,
        find="      sum += weight[s][row_of_element(i % 8)] *",
        replace="      sum += 1.0f *",
        caught_by="wrong-result",
        plan=_SHARED_KEYS,
    ),
    Plant(
        name="share-sum-lost",
        title="the other share's row sums are left out",
        file=_MERGE,
        find="      softmax.row_sum[r] += weight[s][r] * smem_load(theirs + (r + 2) * 128);",
        replace="",
        caught_by="wrong-result",
        plan=_SHARED_KEYS,
    ),
)
