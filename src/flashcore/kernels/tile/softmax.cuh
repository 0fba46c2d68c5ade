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

// The largest score of each of a lane's two rows, over fragments [BEGIN, END).
template <int BEGIN, int END, int NUM_FRAGS>
FC_DEVICE void lane_max(const WmmaAccum (&scores)[NUM_FRAGS], float (&max)[2]) {
  float chain[4] = {NEG_INF, NEG_INF, NEG_INF, NEG_INF};  // two a row, for they wait for each other
#pragma unroll
  for (int n = BEGIN; n < END; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& c = chain[row_of_element(i) * 2 + i % 2];
      c = max_f(c, scores[n].x[i]);
    }
  }
  max[0] = max_f(chain[0], chain[1]);
  max[1] = max_f(chain[2], chain[3]);
}

// Replaces the scores of fragments [BEGIN, END) by exp(score - row_max) and adds them to row_sum.
// exp2(score * scale - max * scale) is one FMA and one exponential; the product max * scale is
// rounded once and enters every term and the lse alike, so its error cancels.
template <int BEGIN, int END, int NUM_FRAGS>
FC_DEVICE void exponentiate(WmmaAccum (&scores)[NUM_FRAGS], OnlineSoftmax& state,
                            float scale_log2) {
  float max_log2[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // A row that has seen nothing yet has max -inf; -inf - (-inf) would be NaN.
    max_log2[r] = state.row_max[r] == NEG_INF ? 0.0f : state.row_max[r] * scale_log2;
  }
#pragma unroll
  for (int n = BEGIN; n < END; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = row_of_element(i);
      const float prob = exp2_approx(fma_rn(scores[n].x[i], scale_log2, -max_log2[r]));
      scores[n].x[i] = prob;
      state.row_sum[r] += prob;
    }
  }
}

// Raises row_max to the maximum with `max`, this lane's part of it, and says by `factor` what
// everything that was relative to the old one must be multiplied by.
FC_DEVICE void raise_max(OnlineSoftmax& state, const float (&max)[2], float (&factor)[2],
                         float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float new_max = max_f(state.row_max[r], quad_max(max[r]));
    const float finite_max = new_max == NEG_INF ? 0.0f : new_max;
    // The difference first: exactly 1 where the maximum stays, or every tile would add an error.
    factor[r] = exp2_approx((state.row_max[r] - finite_max) * scale_log2);
    state.row_sum[r] *= factor[r];
    state.row_max[r] = new_max;
  }
}

// Whether some score of the warp's is so far above its row_max that exp(score - row_max) is over
// 2^8; `max` is this lane's part of the maximum.
FC_DEVICE bool is_far_above(const float (&max)[2], const OnlineSoftmax& state, float scale_log2) {
  return warp_any((max[0] - state.row_max[0]) * scale_log2 > 8.0f ||
                  (max[1] - state.row_max[1]) * scale_log2 > 8.0f);
}

// Replaces scores by exp(score - row_max) and brings row_max and row_sum up to date. `scale_log2`
// takes a score to log2 units. Returns whether row_max moved; then the output so far must be
// multiplied by `rescale`.
//
// LAZY leaves row_max where it is until some row's maximum is far above it (FlashAttention-4): the
// terms stay far from overflow, the result is the same, and the output is hardly ever rescaled.
// Lanes look at their own scores, and exchange maxima only when one of them is that far. It takes
// the tile in two parts, so that the maxima of the second are found while the exponentials of the
// first are under way.
template <bool LAZY, int NUM_FRAGS>
FC_DEVICE bool softmax_step(WmmaAccum (&scores)[NUM_FRAGS], OnlineSoftmax& state,
                            float (&rescale)[2], float scale_log2) {
  constexpr int FIRST_PART = LAZY ? NUM_FRAGS / 2 : NUM_FRAGS;
  float max[2];
  lane_max<0, FIRST_PART>(scores, max);
  bool moved = !LAZY || is_far_above(max, state, scale_log2);
  if (moved) raise_max(state, max, rescale, scale_log2);
  exponentiate<0, FIRST_PART>(scores, state, scale_log2);
  if (!LAZY) return moved;

  lane_max<FIRST_PART, NUM_FRAGS>(scores, max);
  if (is_far_above(max, state, scale_log2)) {
    float factor[2];
    raise_max(state, max, factor, scale_log2);
#pragma unroll
    for (int n = 0; n < FIRST_PART; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[n].x[i] *= factor[row_of_element(i)];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) rescale[r] = moved ? rescale[r] * factor[r] : factor[r];
    moved = true;
  }
  exponentiate<FIRST_PART, NUM_FRAGS>(scores, state, scale_log2);
  return moved;
}

// What softmax_step would cost most, the search for maxima, is for nothing in nearly every tile. So
// exponentiate first, with row_max as it is, and look at the sums: this says whether a term may be
// so large, over 2^10, that row_max must be raised, or whether there is no row_max yet. `tile` is
// the tile's part: row_max as before, row_sum of its own terms. An infinite term makes an infinite
// sum; NaN is let through.
FC_DEVICE bool has_outgrown(const OnlineSoftmax& tile) {
  const bool has_max = (tile.row_max[0] > NEG_INF) & (tile.row_max[1] > NEG_INF);  // no branches
  return (tile.row_sum[0] > 1024.0f) | (tile.row_sum[1] > 1024.0f) | !has_max;
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
