"""Plant bugs in the backward kernels for Hopper (tests/plants/test_sim_plants_bwd_sm90.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_DQ = "bwd_sm90/attn_bwd_dq_sm90.cuh"
_DELTA = "bwd_sm90/bwd_delta_sm90.cuh"
_DKDV = "bwd_sm90/attn_bwd_dkdv_sm90.cuh"
_LOADS = "bwd_sm90/bwd_dkdv_sm90.cuh"
_STEPS = "bwd_sm90/bwd_dkdv_steps_sm90.cuh"
_ROLES = "bwd_sm90/bwd_dkdv_roles_sm90.cuh"
_SHARED = "bwd_sm90/bwd_sm90.cuh"
_BAND = "tile/band.cuh"

# In the kernel of dk and dv, without head_dim above 128.
_OF_ONE_WARPGROUP = (
    Plant(
        name="stale-stats",
        title="a query tile is read without waiting for it",
        file=_STEPS,
        find="  mbar_wait(bar.tile_full + stage",
        replace="  if (false) mbar_wait(bar.tile_full + stage",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="q-not-awaited",
        title="a query tile is said to be there before Q has arrived",
        file=_LOADS,
        find="        mbar_wait(bar.q_full + stage, parity_of<NUM_STAGES>(count));",
        replace="",
        caught_by="async-pending",
        or_by=("race", "uninitialized-read", "mbarrier"),
    ),
    Plant(
        name="stats-released-by-one-lane",
        title="a query tile is released while other lanes still read its lse and delta",
        file=_STEPS,
        find="  warp_sync();  // orders every lane's reads of those before the arrival",
        replace="  // orders every lane's reads of those before the arrival",
        caught_by="race",
    ),
    Plant(
        name="swapped-operand",
        title="dP^T multiplies K instead of V",
        file=_STEPS,
        find="smem.v[group].over_columns()",
        replace="smem.k[group].over_columns()",
        caught_by="wrong-result",
    ),
    Plant(
        name="dp-not-awaited",
        title="dS^T is computed before dP^T has been waited for",
        file=_DKDV,
        find="  wgmma_wait<EARLY_DP && HAS_DK ? 2 : 1>();",
        replace="  wgmma_wait<2>();",
        caught_by="wgmma",
    ),
    Plant(
        name="dk-added-twice",
        title="dK of a key tile starts from that of the one before",
        file=_DKDV,
        find="    clear(c.dk);\n",
        replace="    if (turn == 0) clear(c.dk);\n",
        caught_by="wrong-result",
    ),
    Plant(
        name="query-tile-skipped",
        title="the first query tile that sees a key is passed over where it begins before it",
        file=_BAND,
        find="return {begin / SIZE, (end + SIZE - 1) / SIZE};",
        replace="return {(begin + SIZE - 1) / SIZE, (end + SIZE - 1) / SIZE};",
        caught_by="wrong-result",
    ),
    Plant(
        name="last-of-group-skipped",
        title="the last query head of a group is left out of dK and dV",
        file=_DKDV,
        find="    for (int left = num_walks; left > 0; --left) {",
        replace="    for (int left = num_walks; left > (num_walks > 1); --left) {",
        caught_by="deadlock",
        or_by=("async-pending", "race", "mbarrier", "wrong-result"),
    ),
    Plant(
        name="do-released-early",
        title="dO's buffer is released while dV is under way",
        file=_DKDV,
        find="  }\n  issue_dv(c.dv, c.probs, smem, count);\n",
        replace="  }\n  issue_dv(c.dv, c.probs, smem, count); release_do(bar, count); return;\n",
        caught_by="race",
        or_by=("wgmma", "deadlock", "async-pending", "mbarrier"),
    ),
    Plant(
        name="q-released-early",
        title="Q's buffer is released before dK of its tile is issued",
        file=_DKDV,
        find="    end_dk(c, bar, count - 1);\n  }\n}",
        replace="    release_q(bar, count); end_dk(c, bar, count - 1);\n  }\n}",
        caught_by="race",
        or_by=("mbarrier", "deadlock", "async-pending", "wrong-result"),
        plan={"overlaps": True},
    ),
    Plant(
        name="kv-released-early",
        title="K and V are released before they were used",
        file=_DKDV,
        find="    clear(c.dv);\n    mbar_wait(bar.kv_full, turn % 2);",
        replace="    clear(c.dv); arrive_for_warp(bar.kv_empty);\n    "
        "mbar_wait(bar.kv_full, turn % 2);",
        caught_by="race",
        or_by=("mbarrier", "deadlock", "async-pending", "wrong-result"),
    ),
    Plant(
        name="empty-rows-spread",
        title="NaN that arrives at a row that sees nothing spreads over all keys of its tile",
        file=_LOADS,
        find="        if (warp_any(some_empty)) clear_rows(smem, do_stage, is_empty);",
        replace="        if (warp_any(false)) clear_rows(smem, do_stage, is_empty);",
        caught_by="wrong-result",
    ),
    Plant(
        name="clear-without-fence",
        title="rows are cleared, but the tensor cores need not see it",
        file=_LOADS,
        find="  fence_proxy_async();\n",
        replace="\n",
        caught_by="missing-fence",
    ),
    Plant(
        name="scale-forgotten",
        title="dK is stored without the scale of the scores",
        file=_DKDV,
        find="    store_rows(c.dk, p.softmax_scale, out.as",
        replace="    store_rows(c.dk, 1.0f, out.as",
        caught_by="wrong-result",
    ),
    Plant(
        name="neighbour-lse",
        title="two neighbours share the lse of the first",
        file=_STEPS,
        find="probability(scores[n].x[i], half_of(pair, i % 2), p, mask[i])",
        replace="probability(scores[n].x[i], half_of(pair, 0), p, mask[i])",
        caught_by="wrong-result",
    ),
    Plant(
        name="dk-over-dv",
        title="dK overwrites dV in shared memory while that leaves",
        file=_SHARED,
        find="  if (leads) tma_store_wait_read<PENDING>();  // of what lay here before",
        replace="  // of what lay here before",
        caught_by="race",
    ),
    Plant(
        name="diagonal-hidden",
        title="a query does not see the last key that the window allows",
        file=_BAND,
        find="begin[r] = diagonal - band.left() - first_col;",
        replace="begin[r] = diagonal - band.left() - first_col + 1;",
        caught_by="wrong-result",
    ),
)

# In the kernel of dq.
_OF_DQ = (
    Plant(
        name="delta-of-one-lane",
        title="delta is a quarter of the row's sum",
        file=_DELTA,
        find="    sum = quad_sum(sum);\n",
        replace="\n",
        caught_by="wrong-result",
    ),
    Plant(
        name="dlse-forgotten",
        title="what arrives through lse is left out of delta",
        file=_DELTA,
        find="is_null(params.dlse) ? sum : sum - gmem_load(params.dlse + at)",
        replace="sum",
        caught_by="wrong-result",
    ),
    Plant(
        name="k-released-early",
        title="K's buffer is released before dQ is done with it",
        file=_DQ,
        find="  release_v(bar, c.count);\n  score_gradient(c);",
        replace="  release_v(bar, c.count); release_k(bar, c.count);\n  score_gradient(c);",
        caught_by="race",
        or_by=("mbarrier", "deadlock", "async-pending"),
    ),
    Plant(
        name="dout-read-late",
        title="a row tile's dO is released while lanes still read it",
        file=_DQ,
        find="  warp_sync();  // orders reads of dO before its release, and writes of delta before"
        " the count\n",
        replace="\n",
        caught_by="race",
    ),
    Plant(
        name="empty-rows-kept",
        title="dq of a row that sees nothing is what arrived there",
        file=_DQ,
        find="          if (is_empty[row_of_element(i)]) c.dq[d].x[i] = 0.0f;",
        replace="          if (false) c.dq[d].x[i] = 0.0f;",
        caught_by="wrong-result",
    ),
)

# In the kernel of dk and dv, with head_dim above 128.
_OF_ROLES = (
    Plant(
        name="probs-not-awaited",
        title="the second role takes P^T before the first has handed it over",
        file=_ROLES,
        find="        mbar_wait(bar.probs_full, int(count % 2));\n",
        replace="\n",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="probs-overwritten",
        title="the first role hands over P^T before the last one has been taken",
        file=_ROLES,
        find="        mbar_wait(bar.probs_empty, int(count % 2) ^ 1);\n#pragma unroll",
        replace="\n#pragma unroll",
        caught_by="race",
        or_by=("deadlock", "mbarrier"),  # two fills of a barrier whose phase nobody saw
    ),
    Plant(
        name="probs-taken-early",
        title="P^T is said to be taken, and V with it to be read, while dP^T is under way",
        file=_ROLES,
        find="        wgmma_wait<0>();\n        wgmma_hold(dprobs);\n"
        "        mbar_arrive(bar.probs_empty);\n",
        replace="        mbar_arrive(bar.probs_empty);\n"
        "        wgmma_wait<0>();\n        wgmma_hold(dprobs);\n",
        caught_by="race",
    ),
    Plant(
        name="v-overwritten",
        title="dV leaves through V's place while the other role still reads V",
        file=_ROLES,
        find="    mbar_wait(bar.probs_empty, int(count % 2) ^ 1);\n    clear_behind",
        replace="\n    clear_behind",
        caught_by="race",
    ),
    Plant(
        name="place-released-early",
        title="K's place is loaded again while dK leaves through it",
        file=_SHARED,
        find="  await_stores();\n",
        replace="\n",
        caught_by="race",
        or_by=("async-pending",),
    ),
)

PLANTS_BWD_DQ_SM90 = by_name(*_OF_DQ)
PLANTS_BWD_DKDV_SM90 = by_name(*_OF_ONE_WARPGROUP)
PLANTS_BWD_ROLES_SM90 = by_name(*_OF_ROLES)
