// tile/softmax.cuh - online softmax of one warp's 16 rows (Milakov and Gimelshein 2018,
// arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691, algorithm 1), all in float32.
//
// After every key tile, over the keys seen so far:
//   row_max = max(score),  row_sum = sum(exp(score - row_max)),  O = sum(exp(score - row_max) * V)
// A lane owns parts of two rows, r = lane / 4 (accumulator elements 0, 1, 4, 5) and r + 8 (2, 3, 6,
// 7); four lanes share a row. row_sum stays a partial sum of each lane until the end.
#pragma once

struct OnlineSoftmax {
  float row_max[2];  // of the scores as they come: raw q.k, or log2 units under SCORES_ARE_LOG2
  float row_sum[2];  // this lane's share
};

FC_DEVICE constexpr int row_of_element(int i) { return i % 4 / 2; }

FC_DEVICE float quad_max(float x) {
  x = max_f(x, shfl_xor(x, 1));
  return max_f(x, shfl_xor(x, 2));
}

FC_DEVICE float quad_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

// Replaces scores by exp(score - row_max) and brings row_max and row_sum up to date. `scale_log2`
// takes a score to log2 units. exp2(score * scale - max * scale) is one FMA and one exponential;
// the product max * scale is rounded once and enters every term and the lse alike, so its error
// cancels.
//
// Returns whether row_max moved; then the output so far must be multiplied by `rescale`. LAZY
// leaves row_max where it is until some row's maximum is over 2^8 times further (FlashAttention-4):
// the terms stay far from overflow, the result is the same, and the output is hardly ever rescaled.
template <bool LAZY, int NUM_FRAGS>
FC_DEVICE bool softmax_step(WmmaAccum (&scores)[NUM_FRAGS], OnlineSoftmax& state,
                            float (&rescale)[2], float scale_log2) {
  float new_max[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float tile_max = NEG_INF;
#pragma unroll
    for (int n = 0; n < NUM_FRAGS; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row_of_element(i) == r) tile_max = max_f(tile_max, scores[n].x[i]);
      }
    }
    new_max[r] = max_f(state.row_max[r], quad_max(tile_max));
  }
  bool moved = true;
  if constexpr (LAZY) {
    moved = warp_any((new_max[0] - state.row_max[0]) * scale_log2 > 8.0f ||
                     (new_max[1] - state.row_max[1]) * scale_log2 > 8.0f);
  }
  float max_log2[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float old_max = state.row_max[r];
    if (moved) state.row_max[r] = new_max[r];
    // A row that has seen nothing yet has max -inf; -inf - (-inf) would be NaN.
    const float finite_max = state.row_max[r] == NEG_INF ? 0.0f : state.row_max[r];
    max_log2[r] = finite_max * scale_log2;
    if (moved) {
      // The difference first: exactly 1 where the maximum stays, or every tile would add an error.
      rescale[r] = exp2_approx((old_max - finite_max) * scale_log2);
      state.row_sum[r] *= rescale[r];
    }
  }
#pragma unroll
  for (int n = 0; n < NUM_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = row_of_element(i);
      const float prob = exp2_approx(fma_rn(scores[n].x[i], scale_log2, -max_log2[r]));
      scores[n].x[i] = prob;
      state.row_sum[r] += prob;
    }
  }
  return moved;
}

template <int NUM_OUT_FRAGS>
FC_DEVICE void rescale_output(WmmaAccum (&out)[NUM_OUT_FRAGS], const float (&rescale)[2]) {
#pragma unroll
  for (int d = 0; d < NUM_OUT_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[d].x[i] *= rescale[row_of_element(i)];
  }
}

// Ends the softmax of a warp's 16 rows: `inverse_sum` is what the output must be multiplied by, and
// the rows' lse is written where it is asked for. A row that saw no key gives 0 and -inf.
FC_DEVICE void finish_softmax(const OnlineSoftmax& state, const AttnParams& p,
                              int64_t first_out_row, int num_valid_rows, float scale_log2,
                              float (&inverse_sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(state.row_sum[r]);
    const bool empty = sum == 0.0f;  // else the largest term alone is near 1; NaN stays NaN
    inverse_sum[r] = empty ? 0.0f : rcp_approx(sum);
    const int row = lane_idx() / 4 + r * 8;
    if (!is_null(p.lse) && lane_idx() % 4 == 0 && row < num_valid_rows) {
      const float lse_log2 = state.row_max[r] * scale_log2 + log2_approx(sum);
      gmem_store(p.lse + (first_out_row + row), empty ? NEG_INF : lse_log2 * (1.0f / LOG2_E));
    }
  }
}
