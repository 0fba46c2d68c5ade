"""Plant bugs of how the backward kernel of dk and dv for Hopper runs beside that of dq
(tests/plants/test_sim_plants_bwd_sm90.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_LOADS = "bwd_sm90/bwd_dkdv_sm90.cuh"

PLANTS_BWD_BESIDE_DQ_SM90 = by_name(
    Plant(
        name="missing-rows-counted",
        title="rows behind the last one are counted among those whose delta is there",
        file="bwd_sm90/attn_bwd_dq_sm90.cuh",
        find="  const int num_rows = min_i(seqlen_q - c.warp_row, 16);",
        replace="  const int num_rows = seqlen_q > c.warp_row ? 16 : 0;",
        caught_by="deadlock",
    ),
)
PLANTS_BWD_BESIDE_SM90 = by_name(
    Plant(
        name="delta-not-awaited",
        title="delta is read while the kernel of dq may still write it",
        file=_LOADS,
        find="  if (runs_beside_dq(params)) await_delta(params);",
        replace="",
        caught_by="early-access",
    ),
    Plant(
        name="delta-of-one-head-awaited",
        title="rows of one head of a group are waited for, which are not the last",
        file=_LOADS,
        find="  gmem_await(count, num_rows);",
        replace="  gmem_await(count, num_rows / heads_per_kv);",
        caught_by="deadlock",
    ),
)
