"""Plant bugs in the backward kernels for Hopper with sequences of different lengths: packed ones,
or keys whose number the device knows (tests/plants/test_sim_plants_bwd_lengths_sm90.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_DQ = "bwd_sm90/attn_bwd_dq_sm90.cuh"
_DELTA = "bwd_sm90/bwd_delta_sm90.cuh"
_DKDV = "bwd_sm90/attn_bwd_dkdv_sm90.cuh"
_LOADS = "bwd_sm90/bwd_dkdv_sm90.cuh"
_SCHEDULE = "tile/schedule_varlen.cuh"

PLANTS_BWD_PACKED_SM90 = by_name(
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
PLANTS_BWD_PACKED_DQ_SM90 = by_name(
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
PLANTS_BWD_PADDED_SM90 = by_name(
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
