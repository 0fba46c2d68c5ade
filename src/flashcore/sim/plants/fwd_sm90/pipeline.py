"""This module plants bugs in the Hopper kernel; see plants.py. Most are about who waits for whom:
the simulator must find each with every seed (tests/plants/test_sim_plants_sm90.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name
from flashcore.sim.plants.fwd_sm90.row_tiles import ROW_TILE_PLANTS
from flashcore.sim.plants.wmma import PLANTS

_KERNEL = "fwd_sm90/attn_fwd_sm90.cuh"
_CONSUMER = "fwd_sm90/consumer_sm90.cuh"
_PRODUCER = "fwd_sm90/producer_sm90.cuh"
_PIPELINE = "fwd_sm90/pipeline_sm90.cuh"
_SCORES_WAIT = """\
  wgmma_wait<OVERLAP ? 1 : 0>();
  wgmma_hold(scores);
"""
_RELEASES = """\
  const auto release_inputs = [&] {
    release(bar.k_empty, c.k_state);
    if (RELEASES_Q_EARLY && n_block < n_block_begin + KEY_SLICES) release_q(c, bar);
  };
"""
_OUTPUT_WAIT = """\
    if (OVERLAP) wgmma_wait<0>();
    wgmma_hold(c.out);
    release(bar.v_empty, c.v_state());
    if (moved) rescale_output(c.out, rescale);
"""
_TURNS = {"block_m": 128, "min_blocks": 1, "key_slices": 1, "num_stages": 2, "ping_pong": True}

_ALL = (
    PLANTS["accum-map"],
    Plant(
        name="no-full-wait",
        title="Q K^T is issued without waiting for K",
        file=_KERNEL,
        find="""\
  if (!HAS_PV || !c.k_is_there) mbar_wait(bar.k_full + c.k_state.stage(), c.k_state.parity());
  if (PING_PONG""",
        replace="\n  if (PING_PONG",
        caught_by="race",
    ),
    Plant(
        name="asked-for-last",
        title="a consumer asks whether the K that it holds is there, not the next one",
        file=_CONSUMER,
        find="mbar_test(bar.k_full + next.stage(), next.parity());",
        replace="mbar_test(bar.k_full + c.k_state.stage(), c.k_state.parity());",
        caught_by="race",
    ),
    Plant(
        name="no-is-yes",
        title="V is used whether it was there or not when it was asked for",
        file=_KERNEL,
        find="  if (!c.v_is_there) mbar_wait(bar.v_full + c.k_state.stage(), c.k_state.parity());",
        replace="",
        caught_by="race",
    ),
    Plant(
        name="output-kept",
        title="P V adds to O of the row tile before",
        file=_KERNEL,
        find="    c.has_out = false;",
        replace="    c.has_out = turn > 0;",
        caught_by="wrong-result",
    ),
    Plant(
        name="no-empty-wait",
        title="the producer loads into a stage that may still be read",
        file=_PRODUCER,
        find="    mbar_wait(bar.k_load_empty + stage, k_state.parity() ^ 1);",
        replace="",
        caught_by="mbarrier",  # it announces bytes while the last ones are under way
        or_by=("race",),  # or overwrites them
    ),
    Plant(
        name="early-release",
        title="K's stage is given back while Q K^T may still read it",
        file=_KERNEL,
        find=_SCORES_WAIT + _RELEASES,
        replace="  release(bar.k_empty, c.k_state);\n"
        + _SCORES_WAIT
        + _RELEASES.replace("    release(bar.k_empty, c.k_state);\n", ""),
        caught_by="race",
    ),
    Plant(
        name="early-q-release",
        title="Q's buffer is given back while the last Q K^T may still read it",
        file=_KERNEL,
        find=_SCORES_WAIT + _RELEASES,
        replace=_RELEASES.splitlines(keepends=True)[2]
        + _SCORES_WAIT
        + "".join(_RELEASES.splitlines(keepends=True)[i] for i in (0, 1, 3)),
        caught_by="race",
    ),
    Plant(
        name="o-part-overwritten",
        title="a part of O is overwritten while its store may still read it",
        file=_KERNEL,
        find="    if (leads) tma_store_wait_read<0>();",
        replace="    if (leads && begin == 0) tma_store_wait_read<0>();",
        caught_by="race",
        plan={"o_parts": 2},
    ),
    Plant(
        name="o-part-misplaced",
        title="a later part of O is written behind the buffer instead of into it",
        file=_KERNEL,
        find="d * 16 - begin * CHUNK,",
        replace="d * 16,",
        caught_by="out-of-bounds",
        or_by=("race",),  # with the next consumer's rows
        plan={"o_parts": 2},
    ),
    Plant(
        name="no-proxy-fence",
        title="no proxy fence between writing O to shared memory and its store by TMA",
        file=_KERNEL,
        find="    fence_proxy_async();",
        replace="",
        caught_by="missing-fence",
    ),
    Plant(
        name="no-store-barrier",
        title="no barrier between the warps' writes of O and its store by TMA",
        file=_KERNEL,
        find="    named_barrier_sync(STORE_BARRIER + c.index, 128);  // orders the writes above",
        replace="    // orders the writes above",
        caught_by="race",
    ),
    Plant(
        name="tx-too-many",
        title="more bytes of K are announced than arrive",
        file=_PRODUCER,
        find="mbar_arrive_expect_tx(full, KLoad::BYTES);",
        replace="mbar_arrive_expect_tx(full, KLoad::BYTES + 128);",
        caught_by="deadlock",
    ),
    Plant(
        name="tx-too-few",
        title="fewer bytes of V are announced than arrive",
        file=_PRODUCER,
        find="mbar_arrive_expect_tx(full, VLoad::BYTES);",
        replace="mbar_arrive_expect_tx(full, VLoad::BYTES / 2);",
        caught_by="mbarrier",
    ),
    Plant(
        name="wrong-parity",
        title="the producer waits for the stage's next release, not its last one",
        file=_PRODUCER,
        find="mbar_wait(bar.v_load_empty + stage, v_state.parity() ^ 1);",
        replace="mbar_wait(bar.v_load_empty + stage, v_state.parity());",
        caught_by="deadlock",
    ),
    Plant(
        name="parity-never-flips",
        title="the parity of a stage stays the same in every round",
        file=_PIPELINE,
        find="return int(count / STAGES % 2); }",
        replace="return 0; }",
        caught_by="mbarrier",  # as no-empty-wait, in the second round
        or_by=("race", "deadlock"),
    ),
    Plant(
        name="stage-mixed-up",
        title="Q K^T reads the stage after its own",
        file=_KERNEL,
        find="""smem.k, c.k_state.stage());
  wgmma_commit();
""",
        replace="""smem.k, (c.k_state.count + 1) % 2);
  wgmma_commit();
""",
        caught_by="race",
    ),
    Plant(
        name="swizzle",
        title="O is written to shared memory without the swizzle that TMA expects",
        file="tile/smem_tile.cuh",
        find="row * CHUNK_COLS +\n"
        "                   swizzled_col<ROW_BYTES>(row, col % CHUNK_COLS + ahead)",
        replace="row * CHUNK_COLS +\n                   (col % CHUNK_COLS + ahead)",
        caught_by="wrong-result",
    ),
    Plant(
        name="v-leading-bytes",
        title="V's descriptor has its column chunks 16 rows apart",
        file=_CONSUMER,
        find="v.over_rows(c.v_state().stage());",
        replace="SmemTile<16, HEAD_DIM_V>{v[c.v_state().stage()].smem}.over_rows();",
        caught_by="wrong-result",
    ),
    Plant(
        name="k-advance",
        title="K's descriptor advances by elements where it takes bytes",
        file=_CONSUMER,
        find="k_desc + k.column_bytes(d)",
        replace="k_desc + k.column_bytes(d) / 2",
        caught_by="wrong-result",
    ),
    Plant(
        name="accum-not-waited-for",
        title="O is rescaled while P V may still add to it",
        file=_KERNEL,
        find=_OUTPUT_WAIT,
        replace=_OUTPUT_WAIT.replace("    if (OVERLAP) wgmma_wait<0>();", ""),
        caught_by="wgmma",
    ),
    Plant(
        name="accum-written-early",
        title="O is rescaled before the wait for P V",
        file=_KERNEL,
        find=_OUTPUT_WAIT,
        replace="""\
    if (moved) rescale_output(c.out, rescale);
    if (OVERLAP) wgmma_wait<0>();
    wgmma_hold(c.out);
    release(bar.v_empty, c.v_state());
""",
        caught_by="wgmma",
        plan={"lazy_rescale": False},
    ),
    Plant(
        name="probs-written-early",
        title="P is overwritten while P V may still read it",
        file=_KERNEL,
        find="  } else {\n    moved = softmax_step<",
        replace="  } else {\n"
        "    for (int n = 0; n < KEY_FRAGS; ++n) wmma_accum_to_a(c.probs[n], scores[n]);"
        " moved = softmax_step<",
        caught_by="wgmma",
    ),
    Plant(
        name="no-commit",
        title="the last P V is not committed, so the wait does not wait for it",
        file=_KERNEL,
        find="""\
  wgmma_commit();
  wgmma_wait<0>();
""",
        replace="""\

  wgmma_wait<0>();
""",
        caught_by="wgmma",
    ),
    Plant(
        name="no-wgmma-fence",
        title="no wgmma_fence between the softmax of a tile and the next products",
        file=_KERNEL,
        find="""\
  wgmma_fence();
  issue_scores(""",
        replace="""\

  issue_scores(""",
        caught_by="wgmma",
    ),
    Plant(
        name="exit-with-store",
        title="a block ends while its last O may still be read from shared memory",
        file=_KERNEL,
        find="  if (warp_idx() % 4 == 0 && elect_lane()) tma_store_wait_read<0>();",
        replace="",
        caught_by="async-pending",
    ),
    Plant(
        name="o-overwritten",
        title="O is overwritten while the last tile's store may still read it",
        file=_KERNEL,
        find="    if (leads) tma_store_wait_read<0>();",
        replace="",
        caught_by="race",
    ),
    Plant(
        name="no-store-commit",
        title="the stores of O are in no group, so nobody waits for them",
        file=_KERNEL,
        find="      tma_store_commit();",
        replace="",
        caught_by="race",  # with the next tile's O
        or_by=("async-pending",),  # in a block that has no next tile
    ),
    Plant(
        name="turn-count",
        title="the barrier of the turns counts one warpgroup on one side and two on the other",
        file=_CONSUMER,
        find="named_barrier_arrive(ISSUE_BARRIER + (c.index + 1) % NUM_CONSUMERS, 256);",
        replace="named_barrier_arrive(ISSUE_BARRIER + (c.index + 1) % NUM_CONSUMERS, 128);",
        caught_by="deadlock",
        or_by=("named-barrier",),  # when the other side waits already
        plan=_TURNS,
    ),
    Plant(
        name="turn-not-handed-on",
        title="a warpgroup does not hand its turn on",
        file=_KERNEL,
        find="    if (PING_PONG) hand_over_issue(c);",
        replace="",
        caught_by="deadlock",
        plan=_TURNS,
    ),
    Plant(
        name="no-init-fence",
        title="the mbarriers' initialisation is not fenced for TMA",
        file=_PIPELINE,
        find="  mbar_init_fence();",
        replace="",
        caught_by="missing-fence",
    ),
    Plant(
        name="no-init-barrier",
        title="no barrier between the mbarriers' initialisation and their use",
        file=_KERNEL,
        find="  block_sync();  // orders the initialisation",
        replace="  // orders the initialisation",
        caught_by="mbarrier",
    ),
    Plant(
        name="registers-of-three-warps",
        title="one warp of a warpgroup does not change its number of registers",
        file=_KERNEL,
        find="    raise_registers<CONSUMER_REGISTERS>();",
        replace="    if (warp_idx() % 4 != 3) raise_registers<CONSUMER_REGISTERS>();",
        caught_by="divergence",
    ),
)

PLANTS_SM90 = by_name(*_ALL, *ROW_TILE_PLANTS)
