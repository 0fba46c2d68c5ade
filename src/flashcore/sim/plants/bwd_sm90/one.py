"""Plant bugs of dq in the kernel of dk and dv for Hopper, by a warpgroup of its own or shared by
the consumers (tests/plants/test_sim_plants_bwd_one_sm90.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_SUM = "bwd_sm90/bwd_dkdv_dq_sm90.cuh"
_KERNEL = "bwd_sm90/attn_bwd_dkdv_sm90.cuh"
_STEPS = "bwd_sm90/bwd_dkdv_steps_sm90.cuh"

PLANTS_BWD_ONE_SM90 = by_name(
    Plant(
        name="ds-not-awaited",
        title="dQ multiplies dS before it has been handed over",
        file=_SUM,
        find="        await_ds(bar, count);\n#pragma",
        replace="        fence_proxy_async();\n#pragma",
        caught_by="race",
        or_by=("uninitialized-read", "missing-fence", "deadlock", "async-pending", "mbarrier"),
    ),
    Plant(
        name="ds-overwritten",
        title="dS is overwritten while dQ of the tile before still reads it",
        file=_STEPS,
        find="  mbar_wait(bar.ds_empty + stage",
        replace="  if (false) mbar_wait(bar.ds_empty + stage",
        caught_by="race",
        or_by=("mbarrier", "deadlock"),
    ),
    Plant(
        name="ds-without-fence",
        title="dS is handed over, but the tensor cores need not see it",
        file=_SUM,
        find="        await_ds(bar, count);\n#pragma",
        replace="        mbar_wait(bar.ds_full + stage_of<NUM_DS_STAGES>(count), "
        "parity_of<NUM_DS_STAGES>(count));\n#pragma",
        caught_by="missing-fence",
    ),
    Plant(
        name="sums-overwritten",
        title="dQ overwrites that of the tile before while it leaves",
        file=_SUM,
        find="  mbar_wait(bar.sums_empty + place.number, parity_of<1>(place.count) ^ 1);\n#pragma",
        replace="\n#pragma",
        caught_by="race",
        or_by=("mbarrier", "deadlock"),
    ),
    Plant(
        name="sums-released-early",
        title="the place of dQ is given back while dQ leaves it",
        file=_SUM,
        find="  tma_store_wait_read<0>();\n  for",
        replace="\n  for",
        caught_by="race",
    ),
    Plant(
        name="adders-at-one-barrier",
        title="two threads that add every other tile wait at one barrier: phases pass unseen",
        file=_SUM,
        find="(part * ADDERS_OF_PART + stage_of<ADDERS_OF_PART>(count))",
        replace="part",
        caught_by="uninitialized-read",
        or_by=("race", "deadlock", "missing-fence", "mbarrier"),
    ),
    Plant(
        name="sums-without-fence",
        title="dQ leaves as it lay in shared memory before it was written",
        file=_SUM,
        find="    fence_proxy_async();\n    const int",
        replace="\n    const int",
        caught_by="missing-fence",
    ),
    Plant(
        name="ds-released-early",
        title="dS is released while dQ is under way",
        file=_SUM,
        find="          issue_dq(dq, smem, group, 0, count);\n          wgmma_wait<0>();\n",
        replace="          issue_dq(dq, smem, group, 0, count); "
        "if (group == ROW_GROUPS - 1) "
        "arrive_for_warp(bar.ds_empty + stage_of<NUM_DS_STAGES>(count));\n"
        "          wgmma_wait<0>();\n",
        caught_by="race",
        or_by=("mbarrier", "deadlock", "wgmma"),
    ),
    Plant(
        name="k-released-before-dq",
        title="K is released while dQ still reads it",
        file=_SUM,
        find="    mbar_wait(bar.kv_full, turn % 2);\n    for",
        replace="    mbar_wait(bar.kv_full, turn % 2); arrive_for_warp(bar.kv_empty);\n    for",
        caught_by="race",
        or_by=("mbarrier", "deadlock", "async-pending", "wrong-result"),
    ),
    Plant(
        name="neighbour-rows",
        title="dQ is added to the rows of the next tile",
        file=_SUM,
        find="  const int row = m_begin + (DQ_SHARED ? 0 : first * 64);",
        replace="  const int row = m_begin + (DQ_SHARED ? 0 : (first ^ 1) * 64);",
        caught_by="wrong-result",
        or_by=("out-of-bounds", "atomic-order", "deadlock"),
    ),
    Plant(
        name="head-of-group",
        title="dQ of every head of a group is added to the first one's",
        file=_SUM,
        find="const auto sums = sums_of(params, block.batch_idx, block.head_idx + head, 0);",
        replace="const auto sums = sums_of(params, block.batch_idx, block.head_idx, 0);",
        caught_by="wrong-result",
        or_by=("deadlock", "atomic-order"),
    ),
)

# The order in which blocks add up dQ.
PLANTS_BWD_ORDER_SM90 = by_name(
    Plant(
        name="turn-not-awaited",
        title="blocks add to dQ in the order in which they come",
        file=_SUM,
        find="    gmem_await(turn, rank);",
        replace="    if (false) gmem_await(turn, rank);",
        caught_by="atomic-order",
    ),
    Plant(
        name="turn-told-early",
        title="the next block may add before this one's add is complete",
        file=_SUM,
        find="    tma_store_wait<0>();\n    gmem_release_add(turn, 1);\n",
        replace="    gmem_release_add(turn, 1);\n    tma_store_wait<0>();\n",
        caught_by="atomic-order",
    ),
    Plant(
        name="turn-told-when-read",
        title="the next block may add once this one's dQ has left shared memory",
        file=_SUM,
        find="    tma_store_wait<0>();",
        replace="    tma_store_wait_read<0>();",
        caught_by="atomic-order",
    ),
    Plant(
        name="turn-told-relaxed",
        title="who finds that it is its turn need not see the add before",
        file=_SUM,
        find="    gmem_release_add(turn, 1);",
        replace="    gmem_atomic_add(turn, 1);",
        caught_by="atomic-order",
    ),
    Plant(
        name="turn-without-fence",
        title="who finds that it is its turn knows of the add before, TMA need not",
        file=_SUM,
        find="    fence_proxy_async_global();\n",
        replace="\n",
        caught_by="missing-fence",
    ),
    Plant(
        name="rank-from-the-first-key",
        title="a block waits for blocks whose keys a window hides from the rows",
        file=_SUM,
        find=" - key_tiles(p, m_begin).begin;",
        replace=";",
        caught_by="deadlock",
    ),
    Plant(
        name="first-adds-too",
        title="the first block adds to what lay there, instead of storing",
        file=_SUM,
        find="      if (ORDERED && rank == 0) {",
        replace="      if (rank < 0) {",
        caught_by="wrong-result",
    ),
)

# In the kernels before and behind.
PLANTS_BWD_DELTA_SM90 = by_name(
    Plant(
        name="turns-not-zeroed",
        title="the kernel before leaves the counters of who has added as they were",
        file="bwd_sm90/attn_bwd_delta_sm90.cuh",
        find="  if (ORDERED && thread_idx() == 0) {",
        replace="  if (ORDERED && thread_idx() < 0) {",
        caught_by="unwritten-output",
    ),
    Plant(
        name="sums-not-cleared",
        title="in any order: of the sums that blocks will add to the last ones are not cleared",
        file="bwd_sm90/attn_bwd_delta_sm90.cuh",
        find="at < SUMS_OF_GROUP; at",
        replace="at < SUMS_OF_GROUP - 4; at",
        caught_by="unwritten-output",
    ),
)

PLANTS_BWD_ROUND_SM90 = by_name(
    Plant(
        name="unseen-rows-kept",
        title="dQ of rows that see no key is what lay there",
        file="bwd_sm90/attn_bwd_round_sm90.cuh",
        find="has_sums ? sum : 0.0f;",
        replace="sum;",
        caught_by="wrong-result",
    ),
)

# Above head_dim 96, where consumers share dQ.
PLANTS_BWD_SHARED_SM90 = by_name(
    Plant(
        name="ds-of-neighbour-not-awaited",
        title="dQ multiplies dS that the other consumer has not handed over",
        file=_SUM,
        find="  mbar_wait(bar.ds_full + stage_of<NUM_DS_STAGES>(count), "
        "parity_of<NUM_DS_STAGES>(count));\n",
        replace="\n",
        caught_by="race",
        or_by=("uninitialized-read", "missing-fence", "mbarrier", "deadlock"),
    ),
    Plant(
        name="q-of-dk-released-early",
        title="Q and its lse and delta are released while dK is under way",
        file=_KERNEL,
        find="    wgmma_wait<2>();\n    end_dk",
        replace="    wgmma_wait<3>();\n    end_dk",
        caught_by="wgmma",
        or_by=("race", "mbarrier"),
    ),
    Plant(
        name="shared-ds-without-fence",
        title="where consumers share dQ: dS has been handed over, the tensor cores need not see it",
        file=_SUM,
        find="  fence_proxy_async();\n}\n",
        replace="\n}\n",
        caught_by="missing-fence",
    ),
    Plant(
        name="shared-ds-released-early",
        title="dS is released while a consumer's part of dQ is under way",
        file=_KERNEL,
        find="    issue_own_dq(c.dq, smem, c.index, count - 1);\n  }\n",
        replace="    issue_own_dq(c.dq, smem, c.index, count - 1); "
        "arrive_for_warp(bar.ds_empty + stage_of<NUM_DS_STAGES>(count - 1));\n  }\n",
        caught_by="race",
        or_by=("deadlock", "mbarrier", "wgmma"),
    ),
    Plant(
        name="part-of-dq-not-awaited",
        title="a consumer adds its part of dQ while it is under way",
        file=_KERNEL,
        find="    wgmma_wait<0>();\n    end_dq",
        replace="    wgmma_wait<1>();\n    end_dq",
        caught_by="wgmma",
    ),
    Plant(
        name="ds-over-dk",
        title="dS overwrites dK of the key tile before on its way out",
        file=_KERNEL,
        find="      await_stores();\n      named",
        replace="\n      named",
        caught_by="race",
    ),
    Plant(
        name="dk-over-ds",
        title="dK overwrites dS that the other consumer's dQ still reads",
        file=_KERNEL,
        find="  for (int i = 0; i < NUM_DS_STAGES; ++i) await_ds_read(bar, count + i);\n",
        replace="\n",
        caught_by="race",
        or_by=("wrong-result",),
    ),
    Plant(
        name="v-over-dv",
        title="V of the next key tile overwrites dV on its way out",
        file=_KERNEL,
        find="  tma_store_wait_read<1>();",
        replace="",
        caught_by="race",
        or_by=("wrong-result", "async-pending"),
    ),
    Plant(
        name="v-not-awaited",
        title="dP multiplies V that has not arrived",
        file=_KERNEL,
        find="  if (FIRST && ENDS_IN_PLACE) mbar_wait(bar.v_full, turn % 2);\n",
        replace="\n",
        caught_by="async-pending",
        or_by=("race", "uninitialized-read", "mbarrier"),
    ),
    Plant(
        name="last-dq-kept",
        title="dQ of a key tile's last query tile is never handed over",
        file=_KERNEL,
        find="  if (has_tiles) add_dq(c, bar, smem, count - 1);\n",
        replace="\n",
        caught_by="deadlock",
        or_by=("wrong-result", "mbarrier", "race"),
    ),
    Plant(
        name="dq-before-the-first",
        title="dQ of a tile that there is none of is added in place of the first one's",
        file=_KERNEL,
        find="  if (!FIRST && !is_second) add_dq",
        replace="  if (!FIRST) add_dq",
        caught_by="deadlock",
        or_by=("wrong-result", "mbarrier", "race"),
    ),
    Plant(
        name="columns-of-the-other",
        title="both consumers compute the first columns of dQ",
        file=_SUM,
        find="  issue_dq(dq, smem, 0, index * DQ_FRAGS, count);",
        replace="  issue_dq(dq, smem, 0, 0, count);",
        caught_by="wrong-result",
    ),
    Plant(
        name="hidden-keys-attended",
        title="where consumers share dQ: no key is hidden",
        file=_STEPS,
        find="    if (hides) hide_keys(",
        replace="    if (false) hide_keys(",
        caught_by="wrong-result",
    ),
    Plant(
        name="lse-of-the-next-query",
        title="where keys are hidden apart: two neighbours share the lse of the second",
        file=_STEPS,
        find="log2_probability(scores[n].x[i], half_of(pair, i % 2), p",
        replace="log2_probability(scores[n].x[i], half_of(pair, 1), p",
        caught_by="wrong-result",
    ),
)
