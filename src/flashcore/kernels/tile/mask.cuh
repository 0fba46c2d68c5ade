// tile/mask.cuh - turns raw q.k of one 16-row strip into the scores that softmax sees.
#pragma once

// With a softcap or an additive mask, scores leave here in log2 units and softmax must not scale
// again.
constexpr bool SCORES_ARE_LOG2 = HAS_SOFTCAP || MASK_KIND == 2;
constexpr float LOG2_E = 1.44269504088896341f;

// softcap * tanh(score / softcap) by tanh(x) = 1 - 2 / (exp(2x) + 1): absolute error about 2^-22,
// where the hardware's tanh.approx has 2^-11.
FC_DEVICE float apply_softcap(float score, float softcap) {
  const float exponential = exp2_approx(score * (2.0f * LOG2_E) * rcp_approx(softcap));
  return softcap * (1.0f - 2.0f * rcp_approx(exponential + 1.0f));
}

FC_DEVICE float mask_value(bool attend) { return attend ? 0.0f : NEG_INF; }
FC_DEVICE float mask_value(float16 x) { return to_float(x); }
FC_DEVICE float mask_value(bfloat16 x) { return to_float(x); }
FC_DEVICE float mask_value(float x) { return x; }

// Whether some element of rows [row_begin, row_begin + 16) x keys [key_begin, key_begin + BLOCK_N)
// may not be attended to because of the sequence's end or the window. The same for all lanes.
FC_DEVICE bool strip_needs_mask(const AttnParams& p, int row_begin, int key_begin) {
  const int last_key = key_begin + BLOCK_N - 1;
  const QueryRange queries = queries_of(p, row_begin, 16);
  bool needed = last_key >= p.seqlen_k;
  if (HAS_WINDOW_RIGHT) needed |= last_key > queries.first + p.diag_offset + p.window_right;
  if (HAS_WINDOW_LEFT) needed |= key_begin < queries.last + p.diag_offset - p.window_left;
  return needed;
}

// Which columns of a lane's part of the scores its two rows may see, counted from its first one so
// that a compare takes a constant: three registers at most, or four where heads are FOLDED.
struct VisibleColumns {
  int begin[FOLDED ? 2 : 1];  // of the first row; the second one's is 8 further, unless FOLDED
  int end[2];

  FC_DEVICE VisibleColumns(const AttnParams& p, int row_begin, int key_begin) {
    const int lane = opaque(lane_idx());  // or what depends on it alone lives on between key tiles
    const int row = row_begin + accum_row(lane, 0);
    const int first_col = key_begin + accum_col(lane, 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int diagonal = query_of(p, row + accum_row(0, r * 2)) + p.diag_offset;
      if (r == 0 || FOLDED) begin[FOLDED ? r : 0] = diagonal - p.window_left - first_col;
      end[r] = p.seqlen_k;
      if (HAS_WINDOW_RIGHT) end[r] = min_i(end[r], diagonal + p.window_right + 1);
      end[r] -= first_col;
    }
  }

  // Element i of fragment n.
  FC_DEVICE bool contain(int n, int i) const {
    const int col = n * 16 + accum_col(0, i);
    const int past_begin = col - (FOLDED ? 0 : accum_row(0, i));
    return col < end[i % 4 / 2] &&
           (!HAS_WINDOW_LEFT || past_begin >= begin[FOLDED ? i % 4 / 2 : 0]);
  }
};

// Scales and caps the scores where softmax cannot (see SCORES_ARE_LOG2), adds the mask tensor, and
// sets what may not be attended to to -inf. `mask_gmem` is that of this batch and head.
template <int NUM_FRAGS>
FC_DEVICE void mask_scores(WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p,
                           GmemPtr<const MaskElement> mask_gmem, int row_begin, int key_begin) {
  if (HAS_SOFTCAP || MASK_KIND == 2) {
#pragma unroll
    for (int n = 0; n < NUM_FRAGS; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[n].x[i];
        score = HAS_SOFTCAP ? apply_softcap(score * p.softmax_scale, p.softcap) * LOG2_E
                            : score * p.softmax_scale_log2;
      }
    }
  }
  // The branch also keeps ptxas from fetching a mask tensor's elements ahead of the products, which
  // costs more registers than there are.
  if (MASK_KIND == 0 ? !strip_needs_mask(p, row_begin, key_begin) : row_begin >= p.seqlen_q) return;
  const VisibleColumns visible(p, row_begin, key_begin);
#pragma unroll
  for (int n = 0; n < NUM_FRAGS; ++n) {
    const int frag_key = key_begin + n * 16;
    // A mask's elements are fetched a fragment at a time: the branch keeps ptxas from fetching
    // those of all fragments at once, which costs more registers than there are.
    const bool has_mask = MASK_KIND != 0 && frag_key < p.seqlen_k;
    if (has_mask) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = row_begin + accum_row(lane_idx(), i);
        const int key = frag_key + accum_col(lane_idx(), i);
        if (row < p.seqlen_q && visible.contain(n, i)) {
          const auto element = mask_gmem + (row * p.mask_row_stride + key * p.mask_col_stride);
          scores[n].x[i] += mask_value(gmem_load(element)) * LOG2_E;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!visible.contain(n, i)) scores[n].x[i] = NEG_INF;
    }
  }
}
