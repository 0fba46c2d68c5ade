// tile/softmax.cuh - online softmax of one warp's 16 rows (Milakov and Gimelshein 2018,
// arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691, algorithm 1), all in float32.
//
// After every key tile, over the keys seen so far:
//   row_max = max(score),  row_sum = sum(exp(score - row_max)),  O = sum(exp(score - row_max) * V)
// A lane owns parts of two rows, r = lane / 4 (accumulator elements 0, 1, 4, 5) and r + 8 (2, 3, 6,
// 7); four lanes share a row. row_sum stays a partial sum of each lane until the end.
#pragma once

#include "prims.cuh"
#include "tile/band.cuh"
#include "tile/folded_rows.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/sequence.cuh"

struct OnlineSoftmax {
  float row_max[2];  // of the scores as they come: raw q.k, or scaled under SCORES_ARE_SCALED
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

// exp2(score * scale - max * scale) is one FMA and one exponential, but the product max * scale is
// rounded. Its error is the same in all terms of a row, a factor that cancels in O and is nothing
// beside the row's lse, as long as it is near 1: from this product on, 2^11, it may be over 2^-13,
// which rounding P would make visible; from 2^31 on exp2 would overflow or vanish. Rows with so
// large a maximum take the difference first, see subtract_large_max.
constexpr float LARGE_MAX_LOG2 = 2048.0f;

// row_max in log2 units. A row that has seen nothing yet has max -inf; -inf - (-inf) would be NaN.
FC_DEVICE void scale_max(const OnlineSoftmax& state, float scale_log2, float (&max_log2)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    max_log2[r] = state.row_max[r] == NEG_INF ? 0.0f : state.row_max[r] * scale_log2;
  }
}

FC_DEVICE bool is_large(float max_log2) { return abs_f(max_log2) > LARGE_MAX_LOG2; }

// Without branches or with them: what ptxas makes of a whole loop depends on it.
template <bool BRANCHLESS>
FC_DEVICE bool has_large(const float (&max_log2)[2]) {
  if constexpr (BRANCHLESS) return is_large(max_log2[0]) | is_large(max_log2[1]);
  return is_large(max_log2[0]) || is_large(max_log2[1]);
}

// Takes a large row_max from the scores of fragments [BEGIN, END), which is exact wherever the
// result matters, and leaves nothing of it for `exponentiate` to take. Returns whether the warp has
// a large one.
template <int BEGIN, int END, bool BRANCHLESS, int NUM_FRAGS>
FC_DEVICE bool subtract_large_max(WmmaAccum (&scores)[NUM_FRAGS], const OnlineSoftmax& state,
                                  float (&max_log2)[2]) {
  if (!warp_any(has_large<BRANCHLESS>(max_log2))) return false;
  float subtrahend[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool large = is_large(max_log2[r]);
    subtrahend[r] = large ? state.row_max[r] : 0.0f;
    max_log2[r] = large ? 0.0f : max_log2[r];
  }
#pragma unroll
  for (int n = BEGIN; n < END; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[n].x[i] -= subtrahend[row_of_element(i)];
  }
  return true;
}

// Replaces the scores of fragments [BEGIN, END) by exp(score - row_max). `sum` is that of these
// terms alone: row_sum then adds up few sums, not many terms, and loses less.
template <int BEGIN, int END, int NUM_FRAGS>
FC_DEVICE void exponentiate(WmmaAccum (&scores)[NUM_FRAGS], float (&sum)[2],
                            const float (&max_log2)[2], float scale_log2) {
#pragma unroll
  for (int n = BEGIN; n < END; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = row_of_element(i);
      const float prob = exp2_approx(fma_rn(scores[n].x[i], scale_log2, -max_log2[r]));
      scores[n].x[i] = prob;
      const bool is_first = n == BEGIN && i == r * 2;
      sum[r] = is_first ? prob : sum[r] + prob;
    }
  }
}

// Sets the row_max of rows that have seen nothing yet; `max` is this lane's part of it.
FC_DEVICE void begin_max(OnlineSoftmax& state, const float (&max)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) state.row_max[r] = quad_max(max[r]);
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

// Returns whether a score of the warp is so far above its row_max that exp(score - row_max) is over
// 2^8, or a row_max is large; `max` is this lane's part of the maximum.
FC_DEVICE bool is_far_above(const float (&max)[2], const OnlineSoftmax& state,
                            const float (&max_log2)[2], float scale_log2) {
  return warp_any((max[0] - state.row_max[0]) * scale_log2 > 8.0f || is_large(max_log2[0]) ||
                  (max[1] - state.row_max[1]) * scale_log2 > 8.0f || is_large(max_log2[1]));
}

// The same of a lane's scores alone, without branches, and whether row_max is large or not.
FC_DEVICE bool is_far(const float (&max)[2], const OnlineSoftmax& state, float scale_log2) {
  return ((max[0] - state.row_max[0]) * scale_log2 > 8.0f) |
         ((max[1] - state.row_max[1]) * scale_log2 > 8.0f);
}

// The fragments of a key tile that a lazy softmax_step takes first.
FC_DEVICE constexpr int first_part_of(int num_frags) { return num_frags / 2; }

struct PartAsItIs {
  static constexpr bool IS_LATE = false;

  template <int NUM_FRAGS>
  FC_DEVICE bool hide(WmmaAccum (&)[NUM_FRAGS]) {
    return true;
  }
};

// The rest of a strip's scores. If it is HIDDEN_LATE, the window is applied when softmax_step comes
// to it; where no row sees a key of it, as all lanes say, the scores stay as they are.
template <bool HIDDEN_LATE>
struct SecondPart {
  static constexpr bool IS_LATE = HIDDEN_LATE;

  const AttnParams& p;
  int row_begin, key_begin;
  bool is_seen = true;

  template <int NUM_FRAGS>
  FC_DEVICE bool hide(WmmaAccum (&scores)[NUM_FRAGS]) {
    constexpr int BEGIN = first_part_of(NUM_FRAGS);
    if (!HIDDEN_LATE) return true;
    is_seen = warp_any(window_reaches<16>(p, row_begin, key_begin + BEGIN * 16));
    if (is_seen) hide_scores<BEGIN, NUM_FRAGS>(scores, p, row_begin, key_begin);
    return is_seen;
  }
};

// Replaces scores by exp(score - row_max) and brings row_max and row_sum up to date. `scale_log2`
// takes a score to log2 units. Returns whether row_max moved; then the output so far must be
// multiplied by `rescale`.
//
// LAZY leaves row_max where it is until some row's maximum is far above it (FlashAttention-4): the
// terms stay far from overflow, the result is the same, and the output is hardly ever rescaled. A
// large row_max is not left: so one vote finds both.
// Lanes look at their own scores, and exchange maxima only when one of them is that far. It takes
// the tile in two parts, so that the maxima of the second are found while the exponentials of the
// first are under way.
//
// FIRST says that rows have seen nothing yet: there is nothing to compare with, nor to rescale, and
// the tile is taken as one unless its second part is hidden late. With ASKS_ONCE, a second part
// knows from the first whether a row_max is large.
template <bool LAZY, bool ASKS_ONCE, bool FIRST, int NUM_FRAGS, class Second>
FC_DEVICE bool softmax_step(WmmaAccum (&scores)[NUM_FRAGS], OnlineSoftmax& state,
                            float (&rescale)[2], float scale_log2, Second& second) {
  constexpr bool IN_PARTS = LAZY && (!FIRST || Second::IS_LATE);
  constexpr int FIRST_PART = IN_PARTS ? first_part_of(NUM_FRAGS) : NUM_FRAGS;
  float max[2];
  float max_log2[2];
  lane_max<0, FIRST_PART>(scores, max);
  scale_max(state, scale_log2, max_log2);
  bool moved = !LAZY || FIRST ||
               (ASKS_ONCE ? warp_any(is_far(max, state, scale_log2) | has_large<true>(max_log2))
                          : is_far_above(max, state, max_log2, scale_log2));
  bool warp_has_large = false;
  if (moved) {
    if (FIRST) {
      begin_max(state, max);
    } else {
      raise_max(state, max, rescale, scale_log2);
    }
    scale_max(state, scale_log2, max_log2);
    warp_has_large = subtract_large_max<0, FIRST_PART, ASKS_ONCE>(scores, state, max_log2);
  }
  float sum[2];
  exponentiate<0, FIRST_PART>(scores, sum, max_log2, scale_log2);
  state.row_sum[0] += sum[0];
  state.row_sum[1] += sum[1];
  if constexpr (!IN_PARTS) return moved;
  if (!second.hide(scores)) return moved;

  lane_max<FIRST_PART, NUM_FRAGS>(scores, max);
  if (!ASKS_ONCE) scale_max(state, scale_log2, max_log2);
  if (ASKS_ONCE ? warp_any(is_far(max, state, scale_log2) | warp_has_large)
                : is_far_above(max, state, max_log2, scale_log2)) {
    float factor[2];
    raise_max(state, max, factor, scale_log2);
    scale_max(state, scale_log2, max_log2);
    subtract_large_max<FIRST_PART, NUM_FRAGS, ASKS_ONCE>(scores, state, max_log2);
#pragma unroll
    for (int n = 0; n < FIRST_PART; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[n].x[i] *= factor[row_of_element(i)];
    }
#pragma unroll
    for (int r = 0; !FIRST && r < 2; ++r) rescale[r] = moved ? rescale[r] * factor[r] : factor[r];
    moved = true;
  }
  exponentiate<FIRST_PART, NUM_FRAGS>(scores, sum, max_log2, scale_log2);
  state.row_sum[0] += sum[0];
  state.row_sum[1] += sum[1];
  return moved;
}

template <bool LAZY, bool ASKS_ONCE = false, int NUM_FRAGS>
FC_DEVICE bool softmax_step(WmmaAccum (&scores)[NUM_FRAGS], OnlineSoftmax& state,
                            float (&rescale)[2], float scale_log2) {
  PartAsItIs second;
  return softmax_step<LAZY, ASKS_ONCE, false>(scores, state, rescale, scale_log2, second);
}

// The search for maxima costs most of softmax_step, and is for nothing in nearly every tile. So
// exponentiate first, with row_max as it is, and look at the sums: this says whether a term may be
// so large, over 2^10, that row_max must be raised, or whether row_max is large, or -inf, as there
// is none yet. `tile_sum` are sums of the tile's own terms, `max_log2` the product of row_max that
// they were made with. An infinite term makes an infinite sum; NaN is let through.
// The order, too, is what a whole loop of ptxas depends on.
template <bool SUMS_FIRST = false>
FC_DEVICE bool has_outgrown(const float (&tile_sum)[2], const float (&max_log2)[2]) {
  if constexpr (SUMS_FIRST) {
    return (tile_sum[0] > 1024.0f) | (tile_sum[1] > 1024.0f) | has_large<true>(max_log2);
  }
  const bool has_max = !has_large<true>(max_log2);
  return (tile_sum[0] > 1024.0f) | (tile_sum[1] > 1024.0f) | !has_max;
}

template <int NUM_OUT_FRAGS>
FC_DEVICE void rescale_output(WmmaAccum (&out)[NUM_OUT_FRAGS], const float (&rescale)[2]) {
#pragma unroll
  for (int d = 0; d < NUM_OUT_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[d].x[i] *= rescale[row_of_element(i)];
  }
}

// The sink of a row's head, a natural logarithm as lse is. Where heads are folded (pack-GQA) a
// block's head stands for several, of num_queries rows each. Rows behind the last have its sink.
FC_DEVICE float sink_of(const AttnParams& p, int head_idx, int row) {
  if (PACKED) return gmem_load(p.tensors.sinks + (head_idx + head_of(p, row)));
  const int heads_of_rows = p.seqlen_q / p.num_queries;
  const int head = min_i(row, p.seqlen_q - 1) / p.num_queries;
  return gmem_load(p.tensors.sinks + (head_idx * heads_of_rows + head));
}

// Lets the sink join a row's softmax: one more term, exp(sink), whose value is 0. row_max becomes
// the larger of both, in natural units, and row_sum the sum relative to it. Returns what else the
// output must be multiplied by. The sink may be far above row_max, which is -inf without a key.
FC_DEVICE float join_sink(float& row_max, float& row_sum, float sink, const AttnParams& p) {
  const float own_max = SCORES_ARE_SCALED ? row_max : row_max * p.softmax_scale;
  row_max = max_f(own_max, sink);
  const float finite_max = row_max == NEG_INF ? 0.0f : row_max;
  const float weight = exp2_approx((own_max - finite_max) * LOG2_E);
  row_sum = fma_rn(row_sum, weight, exp2_approx((sink - finite_max) * LOG2_E));
  return weight;
}

// The natural logarithm of a row's sum of exp(score), sink included. In natural units from the
// start: a row_max near the end of float32 would overflow in log2 units.
FC_DEVICE float natural_lse(float row_max, float row_sum, const AttnParams& p) {
  const float scale = SCORES_ARE_SCALED || HAS_SINKS ? 1.0f : p.softmax_scale;
  return fma_rn(row_max, scale, log2_approx(row_sum) * (1.0f / LOG2_E));
}

// Ends the softmax of a warp's 16 rows of head `head_idx`: `inverse_sum` is what the output must be
// multiplied by, and the rows' lse is written where it is asked for. A row that saw no key gives 0
// and -inf, or its sink.
FC_DEVICE void finish_softmax(const OnlineSoftmax& state, const AttnParams& p,
                              int64_t first_out_row, int num_valid_rows, int head_idx,
                              float (&inverse_sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = quad_sum(state.row_sum[r]);
    float row_max = state.row_max[r];
    float weight = 1.0f;
    if constexpr (HAS_SINKS) {
      const int row = p.seqlen_q - num_valid_rows + lane_idx() / 4 + r * 8;
      weight = join_sink(row_max, sum, sink_of(p, head_idx, row), p);
    }
    const bool empty = sum == 0.0f;  // else the largest term alone is near 1; NaN stays NaN
    inverse_sum[r] = empty ? 0.0f : weight * rcp_approx(sum);
    if (FLOAT8) inverse_sum[r] *= p.scales.v_factor;
    const int row = lane_idx() / 4 + r * 8;
    const int own_row = p.seqlen_q - num_valid_rows + row;
    const bool is_valid = FOLDS_PACKED ? is_row(p, own_row) : row < num_valid_rows;
    if (!is_null(p.tensors.lse) && lane_idx() % 4 == 0 && is_valid) {
      const float lse = natural_lse(row_max, sum, p);
      const int64_t out_row =
          FOLDS_PACKED ? lse_offset(p, {0, head_idx, 0, 0}, own_row) : first_out_row + row;
      gmem_store(p.tensors.lse + out_row, empty ? NEG_INF : lse);
    }
  }
}
