"""This module plants bugs in how a sink joins the softmax of a row, of both kernels."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_SOFTMAX = "tile/softmax.cuh"

PLANTS_SINKS = by_name(
    Plant(
        name="sink-of-the-first",
        title="heads that are rows of one take the sink of the first of them",
        file=_SOFTMAX,
        find="gmem_load(p.tensors.sinks + (head_idx * heads_of_rows + head));",
        replace="gmem_load(p.tensors.sinks + head_idx * heads_of_rows);",
        caught_by="wrong-result",
    ),
    Plant(
        name="sink-past-the-heads",
        title="what is no row has the sink of a head that does not exist",
        file=_SOFTMAX,
        find="  const int head = min_i(row, p.seqlen_q - 1) / p.num_queries;",
        replace="  const int head = row / p.num_queries;",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="sink-beside-raw-scores",
        title="the maximum that a sink is compared with is not scaled",
        file=_SOFTMAX,
        find="  const float own_max = SCORES_ARE_SCALED ? row_max : row_max * p.softmax_scale;",
        replace="  const float own_max = row_max;",
        caught_by="wrong-result",
    ),
)

PLANTS_SINKS_SPLIT = by_name(
    Plant(
        name="sink-of-every-split",
        title="the sink joins each of the shares that are added up, and their sum again",
        file="tile/shares.cuh",
        find="""    const float sum = quad_sum(softmax.row_sum[r]);
    const int row = warp_row + accum_row(lane_idx(), r * 2);""",
        replace="""    const int row = warp_row + accum_row(lane_idx(), r * 2);
"""
        "    float m = softmax.row_max[r], sum = quad_sum(softmax.row_sum[r]); "
        "join_sink(m, sum, sink_of(p, block.head_idx, row), p);",
        caught_by="wrong-result",
    ),
)
