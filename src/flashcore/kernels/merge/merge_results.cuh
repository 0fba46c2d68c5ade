// merge_results.cuh - one result of attention from two over different keys:
//
//   out = share_a out_a + share_b out_b    lse = log(exp(lse_a) + exp(lse_b))
//
// in float32, out rounded once. See merge/merge_rows.cuh; a row that is empty on both sides has out
// 0 and lse -inf.
#pragma once

#include "prims.cuh"
#include "merge/merge_rows.cuh"

struct MergeParams {
  MergeSides sides;
  GmemPtr<ElementOut> out;  // [num_rows, dim]
  GmemPtr<float> lse;       // [num_rows]
};

FC_KERNEL(merge_results, MERGE_WARPS * 32, 1)(const MergeParams params) {
  const MergeSides& p = params.sides;
  const MergeRow at = own_row(p);
  if (!at.exists) return;
  const Shares shares = shares_of(p, at);
  if (at.col == 0) gmem_store(params.lse + at.index, shares.lse);
  const auto row_a = p.out_a + offset_of(at, p.out_a_strides);
  const auto row_b = p.out_b + offset_of(at, p.out_b_strides);
  const auto out = params.out + int64_t(at.index) * p.dim;
  for (int col = at.col; col < p.dim; col += LANES * WIDTH) {
    float a[WIDTH], b[WIDTH];
    load_side(a, row_a, col, shares.has_a);
    load_side(b, row_b, col, shares.has_b);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) a[i] = fma_rn(shares.a, a[i], shares.b * b[i]);
    store_values(out + col, a);
  }
}
