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

// Replaces scores by exp(score - row_max) and brings row_max and row_sum up to date; `rescale` is
// what the output so far must be multiplied by. `scale_log2` takes a score to log2 units.
// exp2(score * scale - max * scale) is one FMA and one exponential; the product max * scale is
// rounded once and enters every term and the lse alike, so its error cancels.
template <int NUM_FRAGS>
FC_DEVICE void softmax_step(WmmaAccum (&scores)[NUM_FRAGS], OnlineSoftmax& state,
                            float (&rescale)[2], float scale_log2) {
  float max_log2[2];
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
    const float new_max = max_f(state.row_max[r], quad_max(tile_max));
    // A row that has seen nothing yet has max -inf; -inf - (-inf) would be NaN.
    max_log2[r] = new_max == NEG_INF ? 0.0f : new_max * scale_log2;
    rescale[r] = exp2_approx(fma_rn(state.row_max[r], scale_log2, -max_log2[r]));
    state.row_max[r] = new_max;
    state.row_sum[r] *= rescale[r];
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
}

template <int NUM_OUT_FRAGS>
FC_DEVICE void rescale_output(WmmaAccum (&out)[NUM_OUT_FRAGS], const float (&rescale)[2]) {
#pragma unroll
  for (int d = 0; d < NUM_OUT_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[d].x[i] *= rescale[row_of_element(i)];
  }
}
