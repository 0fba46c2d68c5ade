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
_SCHEDULE = "tile/schedule_varlen.cuh"
_BAND = "tile/band.cuh"

# In the kernel of dk and dv, without head_dim above 128.
_OF_ONE_WARPGROUP = (
    Plant(
        name="stale-stats",
        title="lse and delta are read without waiting for them",
        file=_STEPS,
        find="  mbar_wait(bar.stats_full + stage",
        replace="  if (false) mbar_wait(bar.stats_full + stage",
        caught_by="race",
        or_by=("uninitialized-read",),
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

# With sequences of different lengths: packed ones, or keys whose number the device knows.
_OF_PACKED = (
    Plant(
        name="neighbour-keys-stored",
        title="64 keys behind a sequence's last one are stored, too",
        file=_LOADS,
        find="block.head_idx_kv, !PACKED || key_row < num_keys};",
        replace="block.head_idx_kv, true};",
        caught_by="misuse",
    ),
    Plant(
        name="box-of-a-key-late",
        title="dK and dV are stored one row late, the last one where the next sequence begins",
        file=_LOADS,
        find="PACKED ? key_box<true>(p, block, 0) :",
        replace="PACKED ? BoxOrigin{key_box<true>(p, block, 0).row, "
        "key_box<true>(p, block, 0).batch + 1} :",
        caught_by="unwritten-output",
        or_by=("out-of-bounds", "double-write"),
    ),
    Plant(
        name="last-keys-forgotten",
        title="the keys behind the last sequence have no rows, and are seen by the queries there",
        file=_LOADS,
        find="  return sequence_params<VARLEN, true>(p, block);",
        replace="  return sequence_params<VARLEN, false>(p, block);",
        caught_by="unwritten-output",
        or_by=("misuse", "out-of-bounds", "deadlock"),
    ),
    Plant(
        name="stats-of-the-first",
        title="every sequence has lse and delta of the first",
        file=_LOADS,
        find="    const int first_row = PACKED ? query_rows<true>(p, block.batch_idx).begin : 0;",
        replace="    const int first_row = 0;",
        caught_by="wrong-result",
    ),
    Plant(
        name="heads-of-queries",
        title="key tiles are dealt out once for each head of q",
        file=_SCHEDULE,
        find="    if (OWNS_KEYS) return p.num_heads_kv;",
        replace="",
        caught_by="out-of-bounds",
        or_by=("double-write", "unwritten-output", "counter-left", "misuse"),
    ),
)
_OF_PACKED_DQ = (
    Plant(
        name="delta-of-a-neighbour",
        title="delta is written where the first sequence has it",
        file=_DELTA,
        find="    const int64_t at = lse_offset(p, block, first_row + row);",
        replace="    const int64_t at = lse_offset(p, block, row);",
        caught_by="double-write",
        or_by=("unwritten-output",),
    ),
    Plant(
        name="queries-behind-stored",
        title="64 queries behind a sequence's last one are stored, too",
        file=_DQ,
        find="!PACKED || group_row < query_rows(p, block.batch_idx).count};",
        replace="true};",
        caught_by="misuse",
    ),
)
_OF_PADDED = (
    Plant(
        name="keys-behind-kept",
        title="keys behind a sequence's last one keep what was added up in their rows",
        file=_LOADS,
        find="  if (!KEY_LENGTHS || first_row + 64 <= num_keys) return;",
        replace="  if (!KEY_LENGTHS || first_row <= num_keys) return;",
        caught_by="wrong-result",
    ),
    Plant(
        name="box-without-a-key",
        title="a box of 64 keys starts behind the sequence's last one",
        file=_LOADS,
        find="      return VARLEN != 0 ? min_i(row, own.seqlen_k - 1) : row;",
        replace="      return row;",
        caught_by="misuse",
    ),
    Plant(
        name="longest-instead-of-own",
        title="the diagonal of every sequence is that of the longest",
        file=_DKDV,
        find="          accumulate(c, sequence, bar, smem, count, own, num_tiles);",
        replace="          accumulate(c, p, bar, smem, count, own, num_tiles);",
        caught_by="wrong-result",
    ),
)

PLANTS_BWD_DQ_SM90 = by_name(*_OF_DQ)
PLANTS_BWD_DKDV_SM90 = by_name(*_OF_ONE_WARPGROUP)
PLANTS_BWD_ROLES_SM90 = by_name(*_OF_ROLES)
PLANTS_BWD_PACKED_SM90 = by_name(*_OF_PACKED)
PLANTS_BWD_PACKED_DQ_SM90 = by_name(*_OF_PACKED_DQ)
PLANTS_BWD_PADDED_SM90 = by_name(*_OF_PADDED)
