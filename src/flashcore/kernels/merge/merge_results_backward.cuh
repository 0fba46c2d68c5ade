// merge_results_backward.cuh - the gradients of merge_results.cuh. With sum_a and sum_b of dout *
// out_a and dout * out_b over a row,
//
//   dout_a = share_a dout    dlse_a = share_a (share_b (sum_a - sum_b) + dlse)
//   dout_b = share_b dout    dlse_b = share_b (share_a (sum_b - sum_a) + dlse)
//
// for share_a's derivative by lse_a is share_a share_b. A row that is empty on both sides gets 0,
// whatever arrives there.
#pragma once

#include "prims.cuh"
#include "merge/merge_rows.cuh"

struct MergeBackwardParams {
  MergeSides sides;
  GmemPtr<const ElementOut> dout;  // or null for zero, like dlse
  GmemPtr<const float> dlse;
  MergeStrides dout_strides, dlse_strides;
  GmemPtr<ElementA> dout_a;  // [num_rows, dim], like dout_b
  GmemPtr<ElementB> dout_b;
  GmemPtr<float> dlse_a, dlse_b;  // [num_rows]
};

FC_KERNEL(merge_results_backward, MERGE_WARPS * 32, 1)(const MergeBackwardParams params) {
  const MergeSides& p = params.sides;
  const MergeRow at = own_row(p);
  const Shares shares = shares_of(p, at);
  const bool is_empty = !shares.has_a && !shares.has_b;
  const bool has_dout = !is_null(params.dout);
  const auto row_a = p.out_a + offset_of(at, p.out_a_strides);
  const auto row_b = p.out_b + offset_of(at, p.out_b_strides);
  const auto row = params.dout + (has_dout ? offset_of(at, params.dout_strides) : 0);
  const auto dout_a = params.dout_a + int64_t(at.index) * p.dim;
  const auto dout_b = params.dout_b + int64_t(at.index) * p.dim;
  float difference = 0.0f;  // sum_a - sum_b, of this lane
  for (int col = at.col; col < p.dim; col += LANES * WIDTH) {
    float g[WIDTH] = {}, a[WIDTH], b[WIDTH];
    if (has_dout) load_side(g, row, col, !is_empty);
    load_side(a, row_a, col, shares.has_a);
    load_side(b, row_b, col, shares.has_b);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      // Not what is 0 anyway times infinity.
      if (has_dout) difference = fma_rn(g[i], a[i] - b[i], difference);
      a[i] = shares.a * g[i];
      b[i] = shares.b * g[i];
    }
    if (at.exists) {
      store_values(dout_a + col, a);
      store_values(dout_b + col, b);
    }
  }
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) difference += shfl_xor(difference, lanes);
  if (!at.exists || at.col != 0) return;
  float dlse = 0.0f;
  if (!is_null(params.dlse) && !is_empty) {
    dlse = gmem_load(params.dlse + offset_of(at, params.dlse_strides));
  }
  gmem_store(params.dlse_a + at.index, shares.a * fma_rn(shares.b, difference, dlse));
  gmem_store(params.dlse_b + at.index, shares.b * fma_rn(-shares.a, difference, dlse));
}
