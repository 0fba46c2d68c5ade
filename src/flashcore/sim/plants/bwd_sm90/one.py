"""Plant bugs of dq in the kernel of dk and dv for Hopper
(tests/plants/test_sim_plants_bwd_one_sm90.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_SUM = "bwd_sm90/bwd_dkdv_dq_sm90.cuh"
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
        find="  if (leads) tma_store_wait_read<ROW_GROUPS - 1>();",
        replace="  if (false) tma_store_wait_read<ROW_GROUPS - 1>();",
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
        find="          issue_dq(dq, smem, group, count);\n          wgmma_wait<0>();\n",
        replace="          issue_dq(dq, smem, group, count); "
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
