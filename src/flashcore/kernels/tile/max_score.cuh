// tile/max_score.cuh - the largest score of each head of q, if a call asks for it: what enters its
// softmax at most, over all rows and keys.
//
// The launch fills the memory with -inf, and every quad raises it to its rows' row_max by an atomic
// maximum, whose order makes no difference. Warpgroups and blocks that share the keys of a row each
// do so for their own, before they add up. row_max must be the maximum, not one of long ago: a plan
// that returns it does not rescale lazily (LAZY_RESCALE).
#pragma once

#include "prims.cuh"
#include "tile/folded_rows.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/softmax.cuh"

// The float of a row's head. Where heads are FOLDED, their rows follow one another in one head.
FC_DEVICE GmemPtr<float> max_score_of(const AttnParams& p, const BlockCoord& block, int row) {
  const int head = block.batch_idx * p.num_heads_q + block.head_idx;
  if (FOLDS_PACKED) return p.max_score + (head + head_of(p, row));
  if (!FOLDED) return p.max_score + head;
  return p.max_score + (head * (p.seqlen_q / p.num_queries) + row / p.num_queries);
}

// Of one row. One that sees no key leaves it alone. A score that is NaN is not in row_max, but it
// is in row_sum.
FC_DEVICE void raise_max_score_of(const AttnParams& p, const BlockCoord& block, int row,
                                  float row_max, float row_sum) {
  const bool is_nan = row_sum != row_sum && row_max < -NEG_INF;
  if (row_max == NEG_INF && !is_nan) return;
  const float scale = SCORES_ARE_SCALED ? 1.0f : p.softmax_scale;
  gmem_atomic_max(max_score_of(p, block, row), is_nan ? row_sum : row_max * scale);
}

// Of a warp's 16 rows. Rows behind the last packed sequence have no float.
FC_DEVICE void raise_max_score(const OnlineSoftmax& state, const AttnParams& p,
                               const BlockCoord& block, int warp_row) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(state.row_sum[r]);
    const int row = warp_row + lane_idx() / 4 + r * 8;
    if (lane_idx() % 4 != 0 || !is_row(p, row)) continue;
    raise_max_score_of(p, block, row, state.row_max[r], sum);
  }
}
