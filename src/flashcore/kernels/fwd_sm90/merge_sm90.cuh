// fwd_sm90/merge_sm90.cuh - adds up what consumers computed that shared the keys of 64 rows.
//
// Each has a slice of the key tiles. Slices have maxima of their own, m1 and m2. With
// m = max(m1, m2), sums and outputs of slice s count exp(ms - m) times. A slice that saw no key has
// m = -inf and counts nothing.
#pragma once

#include "prims_sm90.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"

// A consumer hands this over: O and the state of the softmax, 128 threads' registers.
template <int NUM_OUT_FRAGS>
constexpr int SLICE_FLOATS = (NUM_OUT_FRAGS * 8 + 4) * 128;

// Consumer 0 (`slice` 0) goes on with the sum; the others hand over theirs and have nothing left.
// `turn` counts row tiles. Every thread arrives: compute-sanitizer does not see that one lane may
// arrive for a warp, nor what bar.arrive orders.
template <int NUM_OUT_FRAGS>
FC_DEVICE void merge_slices(int slice, int turn, OnlineSoftmax& softmax,
                            WmmaAccum (&out)[NUM_OUT_FRAGS], const Barriers& bar,
                            SmemPtr<float> merge_smem, float scale_log2) {
  constexpr int FLOATS = SLICE_FLOATS<NUM_OUT_FRAGS>;
  const int thread = thread_idx() % 128;
  if (slice > 0) {
    const auto mine = merge_smem + ((slice - 1) * FLOATS + thread);
    mbar_wait(bar.merge_empty, turn % 2 ^ 1);  // of the last row tile's
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      smem_store(mine + r * 128, softmax.row_max[r]);
      smem_store(mine + (r + 2) * 128, softmax.row_sum[r]);
    }
#pragma unroll
    for (int i = 0; i < NUM_OUT_FRAGS * 8; ++i) {
      smem_store(mine + (i + 4) * 128, out[i / 8].x[i % 8]);
    }
    mbar_arrive(bar.merge_full);
    return;
  }
  mbar_wait(bar.merge_full, turn % 2);
  float weight[KEY_SLICES][2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float own_max = softmax.row_max[r];
#pragma unroll
    for (int s = 1; s < KEY_SLICES; ++s) {
      const float their_max = smem_load(merge_smem + ((s - 1) * FLOATS + r * 128 + thread));
      softmax.row_max[r] = max_f(softmax.row_max[r], their_max);
    }
    const float finite_max = softmax.row_max[r] == NEG_INF ? 0.0f : softmax.row_max[r];
    weight[0][r] = exp2_approx((own_max - finite_max) * scale_log2);
    softmax.row_sum[r] *= weight[0][r];
#pragma unroll
    for (int s = 1; s < KEY_SLICES; ++s) {
      const auto theirs = merge_smem + ((s - 1) * FLOATS + thread);
      weight[s][r] = exp2_approx((smem_load(theirs + r * 128) - finite_max) * scale_log2);
      softmax.row_sum[r] += weight[s][r] * smem_load(theirs + (r + 2) * 128);
    }
  }
#pragma unroll
  for (int i = 0; i < NUM_OUT_FRAGS * 8; ++i) {
    float& sum = out[i / 8].x[i % 8];
    sum *= weight[0][row_of_element(i % 8)];
#pragma unroll
    for (int s = 1; s < KEY_SLICES; ++s) {
      sum += weight[s][row_of_element(i % 8)] *
             smem_load(merge_smem + ((s - 1) * FLOATS + (i + 4) * 128 + thread));
    }
  }
  mbar_arrive(bar.merge_empty);
}
