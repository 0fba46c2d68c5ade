// tile/mask.cuh - turns raw q.k of one 16-row strip into the scores that softmax sees.
#pragma once

#include "prims.cuh"
#include "tile/band.cuh"
#include "tile/folded_rows.cuh"
#include "tile/params.cuh"

// With a softcap or an additive mask, scores leave here scaled, and what is left for softmax is to
// take them to log2 units. Not here: the lowest number of float32 or bfloat16 would overflow.
constexpr bool SCORES_ARE_SCALED = HAS_SOFTCAP || MASK_KIND == 2;
constexpr float LOG2_E = 1.44269504088896341f;

// softcap * tanh(score / softcap) by tanh(x) = 1 - 2 / (exp(2x) + 1): absolute error about 2^-22,
// where the hardware's tanh.approx has 2^-11.
FC_DEVICE float capped(float score, float softcap) {
  const float exponential = exp2_approx(score * (2.0f * LOG2_E) * rcp_approx(softcap));
  return softcap * (1.0f - 2.0f * rcp_approx(exponential + 1.0f));
}

// tanh(x) / x from x^2, for |x| up to SMALL_TANH: relative error 2^-24 before rounding, and nothing
// for the exponential units to do, which are what bounds a soft-capped call.
constexpr float SMALL_TANH = 0.75f;
FC_DEVICE float tanh_ratio(float x2) {
  float y = fma_rn(x2, -0.0047694873f, 0.0196649097f);
  y = fma_rn(x2, y, -0.0533902571f);
  y = fma_rn(x2, y, 0.1332652122f);
  y = fma_rn(x2, y, -0.3333306909f);
  return fma_rn(x2, y, 1.0f);
}

// By the polynomial where it serves: beside a large cap (problem/exactness.py), scores may be so
// small that the error of `capped`, 2^-22 of the cap, would be seen.
FC_DEVICE float capped_exactly(float score, float softcap) {
  const float x = score * rcp_approx(softcap);
  return abs_f(x) < SMALL_TANH ? score * tanh_ratio(x * x) : capped(score, softcap);
}

// Scores become softcap * tanh(score * softmax_scale / softcap). A strip whose
// scores are all far below the cap, as most are, goes the fast way, where that leaves registers.
template <int NUM_FRAGS>
FC_DEVICE void apply_softcap(WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p) {
  if constexpr (TANH_BY_POLYNOMIAL && !SOFTCAP_IS_LARGE) {
    const float over_cap = p.softmax_scale * rcp_approx(p.softcap);
    float largest = 0.0f;
#pragma unroll
    for (int n = 0; n < NUM_FRAGS; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = max_f(largest, abs_f(scores[n].x[i]));
    }
    if (!warp_any(largest * over_cap > SMALL_TANH)) {
#pragma unroll
      for (int n = 0; n < NUM_FRAGS; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float x = scores[n].x[i] * over_cap;
          scores[n].x[i] = scores[n].x[i] * p.softmax_scale * tanh_ratio(x * x);
        }
      }
      return;
    }
  }
#pragma unroll
  for (int n = 0; n < NUM_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float score = scores[n].x[i] * p.softmax_scale;
      scores[n].x[i] =
          SOFTCAP_IS_LARGE ? capped_exactly(score, p.softcap) : capped(score, p.softcap);
    }
  }
}

// A tree mask, [num_queries, num_queries], says which of the last num_queries keys of its sequence
// a query sees; all keys before them it does see. Heads that are folded share it. Packed sequences
// have trees of one size, of which each uses the first rows and columns.
constexpr bool MASK_IS_TREE = MASK_KIND == 3;

// The key that a mask tensor's column 0 is of, and the row that it has for a row of q.
FC_DEVICE int first_masked_key(const AttnParams& p) {
  if (MASK_IS_TREE && (VARLEN == 1 || VARLEN == 4)) return p.band.tree_begin;
  return MASK_IS_TREE ? p.seqlen_k - (FOLDED ? p.num_queries : p.seqlen_q) : 0;
}

FC_DEVICE int mask_row(const AttnParams& p, int row) {
  return MASK_IS_TREE ? query_of(p, row) : row;
}

// Returns whether a mask tensor has no column of keys [key_begin, key_begin + KEYS).
template <int KEYS>
FC_DEVICE bool is_before_mask(const AttnParams& p, int key_begin) {
  return MASK_IS_TREE && key_begin + KEYS <= first_masked_key(p);
}

// The mask tensor of a batch and query head.
FC_DEVICE GmemPtr<const MaskElement> mask_of(const AttnParams& p, int batch_idx, int head_idx) {
  return p.tensors.mask + (batch_idx * p.strides.mask.batch + head_idx * p.strides.mask.head);
}

// A mask tensor's element joins its score.
FC_DEVICE void add_mask(float& score, bool attend) {
  if (!attend) score = NEG_INF;
}

template <class T>
FC_DEVICE void add_mask(float& score, T x) {
  score += to_float(x);
}

// Returns whether a mask tensor's element hides its key, whatever the score: NaN - inf is NaN.
FC_DEVICE bool hides_key(bool attend) { return !attend; }

template <class T>
FC_DEVICE bool hides_key(T) {
  return false;
}

// Returns whether the sequence's end or the window hides some of keys [key_begin, key_begin + KEYS)
// from some of rows [row_begin, row_begin + 16). All lanes agree.
template <int KEYS>
FC_DEVICE bool strip_needs_mask(const AttnParams& p, int row_begin, int key_begin) {
  const bool ends = key_begin + KEYS - 1 >= p.seqlen_k;
  return ends | window_hides_some<16, KEYS>(p, row_begin, key_begin);
}

// Returns the factor that takes scores, as they leave this header, to log2 units.
FC_DEVICE float softmax_scale_log2(const AttnParams& p) {
  return SCORES_ARE_SCALED ? LOG2_E : p.softmax_scale_log2;
}

// Scales and caps the scores where softmax cannot: see SCORES_ARE_SCALED.
template <int NUM_FRAGS>
FC_DEVICE void scale_scores(WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p) {
  if (!SCORES_ARE_SCALED) return;
  if (HAS_SOFTCAP) return apply_softcap(scores, p);
#pragma unroll
  for (int n = 0; n < NUM_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[n].x[i] *= p.softmax_scale;
  }
}

FC_DEVICE void hide_fragment(WmmaAccum& scores, const VisibleColumns<>& visible, int n) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!visible.contain(n, i)) scores.x[i] = NEG_INF;
  }
}

// Sets what the window and the sequence's end hide to -inf, in fragments [BEGIN, END).
template <int BEGIN, int END, int NUM_FRAGS>
FC_DEVICE void hide_scores(WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p, int row_begin,
                           int key_begin) {
  if (!strip_needs_mask<(END - BEGIN) * 16>(p, row_begin, key_begin + BEGIN * 16)) return;
  const VisibleColumns<> visible(p, row_begin, key_begin);
#pragma unroll
  for (int n = BEGIN; n < END; ++n) {
    hide_fragment(scores[n], visible, n);
  }
}

template <int NUM_FRAGS>
FC_DEVICE void hide_scores(WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p, int row_begin,
                           int key_begin) {
  hide_scores<0, NUM_FRAGS>(scores, p, row_begin, key_begin);
}

// Scales and caps the scores, adds the mask tensor, which is read from global memory, and hides
// what may not be attended to. `mask_gmem` is that of this batch and head.
template <int NUM_FRAGS>
FC_DEVICE void mask_scores(WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p,
                           GmemPtr<const MaskElement> mask_gmem, int row_begin, int key_begin) {
  scale_scores(scores, p);
  if (MASK_KIND == 0 || is_before_mask<NUM_FRAGS * 16>(p, key_begin)) {
    return hide_scores(scores, p, row_begin, key_begin);
  }
  // The branch also keeps ptxas from fetching a mask tensor's elements ahead of the products, which
  // costs more registers than there are.
  if (row_begin >= p.seqlen_q) return;
  const VisibleColumns<> visible(p, row_begin, key_begin);
#pragma unroll
  for (int n = 0; n < NUM_FRAGS; ++n) {
    const int frag_key = key_begin + n * 16;
    // A mask's elements are fetched a fragment at a time: the branch keeps ptxas from fetching
    // those of all fragments at once, which costs more registers than there are.
    if (frag_key < p.seqlen_k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = row_begin + accum_row(lane_idx(), i);
        const int key = frag_key + accum_col(lane_idx(), i);
        const int col = key - first_masked_key(p);
        if (row < p.seqlen_q && (!MASK_IS_TREE || col >= 0) && visible.contain(n, i)) {
          const auto element =
              mask_gmem + (mask_row(p, row) * p.strides.mask.row + col * p.strides.mask.col);
          add_mask(scores[n].x[i], gmem_load(element));
        }
      }
    }
    hide_fragment(scores[n], visible, n);
  }
}
