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
        find="        mbar_wait(bar.ds_full + stage",
        replace="        if (false) mbar_wait(bar.ds_full + stage",
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
        file=_STEPS,
        find="  fence_proxy_async();\n",
        replace="\n",
        caught_by="missing-fence",
    ),
    Plant(
        name="sums-overwritten",
        title="dQ overwrites that of the tile before while it leaves",
        file=_SUM,
        find="  if (leads) tma_store_wait_read<PENDING>();",
        replace="  if (false) tma_store_wait_read<PENDING>();",
        caught_by="race",
    ),
    Plant(
        name="sums-without-fence",
        title="dQ leaves as it lay in shared memory before it was written",
        file=_SUM,
        find="  fence_proxy_async();\n",
        replace="\n",
        caught_by="missing-fence",
    ),
    Plant(
        name="ds-released-early",
        title="dS is released while dQ is under way",
        file=_SUM,
        find="          issue_dq(dq, smem, group, 0, count);\n          wgmma_wait<0>();\n",
        replace="          issue_dq(dq, smem, group, 0, count); "
        "if (group == ROW_GROUPS - 1) arrive_for_warp(bar.ds_empty + stage);\n"
        "          wgmma_wait<0>();\n",
        caught_by="race",
        or_by=("mbarrier", "deadlock", "wgmma"),
    ),
    Plant(
        name="k-released-before-dq",
        title="K is released while dQ still reads it",
        file=_SUM,
        find="    mbar_wait(bar.kv_full, turn % 2);\n",
        replace="    mbar_wait(bar.kv_full, turn % 2); arrive_for_warp(bar.kv_empty);\n",
        caught_by="race",
        or_by=("mbarrier", "deadlock", "async-pending", "wrong-result"),
    ),
    Plant(
        name="neighbour-rows",
        title="dQ is added to the rows of the next tile",
        file=_SUM,
        find="          const int row = m_block * BLOCK_M + group * 64;",
        replace="          const int row = m_block * BLOCK_M + (group ^ 1) * 64;",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="head-of-group",
        title="dQ of every head of a group is added to the first one's",
        file=_SUM,
        find="++head, ++block.head_idx) {",
        replace="++head) {",
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
        name="shared-ds-released-early",
        title="dS is released while a consumer's part of dQ is under way",
        file=_KERNEL,
        find="    issue_own_dq(c.dq, bar, smem, c.index, count - 1);\n  }\n",
        replace="    issue_own_dq(c.dq, bar, smem, c.index, count - 1); "
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
        name="dq-over-dk",
        title="dQ overwrites dK of the key tile before on its way out",
        file=_KERNEL,
        find="      await_stores();\n      named",
        replace="\n      named",
        caught_by="race",
    ),
    Plant(
        name="dv-over-dq",
        title="dV overwrites dQ of the last query tile on its way out",
        file=_KERNEL,
        find="    if (DQ_SHARED && elect_lane()) tma_store_wait_read<0>();",
        replace="    ",
        caught_by="race",
    ),
    Plant(
        name="dq-of-the-next-tile",
        title="dQ of the last query tile is added to the rows behind it",
        file=_KERNEL,
        find="  add_dq(c, p, smem, m_begin - BLOCK_M, first);",
        replace="  add_dq(c, p, smem, m_begin, first);",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="dq-before-the-first",
        title="dQ of a tile that there is none of is added before the first one's rows",
        file=_KERNEL,
        find="  const int row = m_begin >= first ? m_begin : p.seqlen_q;",
        replace="  const int row = m_begin;",
        caught_by="out-of-bounds",
        or_by=("wrong-result",),
    ),
    Plant(
        name="columns-of-the-other",
        title="both consumers compute the first columns of dQ",
        file=_SUM,
        find="  issue_dq(dq, smem, 0, index * DQ_FRAGS, count);",
        replace="  issue_dq(dq, smem, 0, 0, count);",
        caught_by="wrong-result",
    ),
)
