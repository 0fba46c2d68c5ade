// tile/gates.cuh - the debug gates: each writes out or takes over one stage of the kernel, so that
// a wrong stage can be told from the ones before it. Present only in sources generated for a gate;
// isolate/gates.py runs them and compares with float64 models.
#pragma once

#include "prims.cuh"
#include "tile/band.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/softmax.cuh"
//@if gate pv_serial
#include "tile/copy.cuh"
//@end
//@if gate ds dv dk dq
#include "tile/sequence.cuh"
//@end

FC_DEVICE int64_t gate_row(const AttnParams& p, const BlockCoord& block, int row) {
  return (int64_t(block.batch_idx) * p.num_heads_q + block.head_idx) * p.seqlen_q + row;
}

//@if gate tile
// Of a kernel that visits key tiles from last to first: the range without all that follow.
FC_DEVICE Range gate_last_tile(const Range& keys) {
  return {max_i(keys.begin, keys.end - 1), keys.end};
}

//@end
//@if gate qk softmax
template <int NUM_FRAGS>
FC_DEVICE void gate_store_scores(const WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p,
                                 const BlockCoord& block, int warp_row, int key_begin) {
  for (int n = 0; n < NUM_FRAGS; ++n) {
    for (int i = 0; i < 8; ++i) {
      const int row = warp_row + accum_row(lane_idx(), i);
      const int key = key_begin + n * 16 + accum_col(lane_idx(), i);
      if (row < p.seqlen_q && key < p.seqlen_k) {
        const int64_t at = gate_row(p, block, row) * p.seqlen_k + key;
        gmem_store(p.gate.gate_scores + at, scores[n].x[i]);
      }
    }
  }
}
//@end
//@if gate softmax

// row_max in natural units of the scaled score, row_sum over all lanes of the row.
FC_DEVICE void gate_store_rows(const OnlineSoftmax& state, const AttnParams& p,
                               const BlockCoord& block, int warp_row, int n_block,
                               float scale_log2) {
  const int num_n_blocks = (p.seqlen_k + BLOCK_N - 1) / BLOCK_N;
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row + lane_idx() / 4 + r * 8;
    const float sum = quad_sum(state.row_sum[r]);
    if (lane_idx() % 4 == 0 && row < p.seqlen_q) {
      const int64_t index = gate_row(p, block, row) * num_n_blocks + n_block;
      gmem_store(p.gate.gate_row_max + index, state.row_max[r] * scale_log2 * (1.0f / LOG2_E));
      gmem_store(p.gate.gate_row_sum + index, sum);
    }
  }
}
//@end
//@if gate pv

template <int NUM_FRAGS>
FC_DEVICE void gate_load_probs(WmmaAccum (&probs)[NUM_FRAGS], const AttnParams& p,
                               const BlockCoord& block, int warp_row, int key_begin) {
  for (int n = 0; n < NUM_FRAGS; ++n) {
    for (int i = 0; i < 8; ++i) {
      const int row = warp_row + accum_row(lane_idx(), i);
      const int key = key_begin + n * 16 + accum_col(lane_idx(), i);
      const bool inside = row < p.seqlen_q && key < p.seqlen_k;
      const GmemPtr<const float> scores = {p.gate.gate_scores.address};
      probs[n].x[i] =
          inside ? gmem_load(scores + (gate_row(p, block, row) * p.seqlen_k + key)) : 0.0f;
    }
  }
}
//@end
//@if gate pv_serial

// P V of the whole block in warp 0, one strip of 16 rows after the other. P and O go through shared
// memory behind the tiles of K and V.
template <int NUM_FRAGS, int NUM_OUT_FRAGS>
FC_DEVICE void gate_accumulate_serially(WmmaAccum (&out)[NUM_OUT_FRAGS],
                                        const WmmaAccum (&probs)[NUM_FRAGS],
                                        SmemPtr<Element> v_smem, int v_stride) {
  constexpr int P_STRIDE = smem_stride(BLOCK_N);
  constexpr int O_STRIDE = NUM_OUT_FRAGS * 16;
  constexpr int P_OFFSET = SMEM_BYTES - GATE_SERIAL_BYTES;
  constexpr int O_OFFSET = P_OFFSET + BLOCK_M * P_STRIDE * int(sizeof(Element));
  static_assert(O_OFFSET + BLOCK_M * O_STRIDE * 4 == SMEM_BYTES, "GATE_SERIAL_BYTES is off");
  const auto p_smem = smem_view<Element>(P_OFFSET, BLOCK_M * P_STRIDE, "p_smem");
  const auto o_smem = smem_view<float>(O_OFFSET, BLOCK_M * O_STRIDE, "o_smem");
  const int warp_strip = warp_idx() * 16;
  for (int i = 0; i < 8; ++i) {
    const int row = warp_strip + accum_row(lane_idx(), i);
    const int col = accum_col(lane_idx(), i);
#pragma unroll
    for (int n = 0; n < NUM_FRAGS; ++n) {
      smem_store(p_smem + (row * P_STRIDE + n * 16 + col), from_float<Element>(probs[n].x[i]));
    }
#pragma unroll
    for (int d = 0; d < NUM_OUT_FRAGS; ++d) {
      smem_store(o_smem + (row * O_STRIDE + d * 16 + col), out[d].x[i]);
    }
  }
  block_sync();  // orders P and O of every warp before warp 0 reads them
  for (int strip = 0; warp_idx() == 0 && strip < BLOCK_M; strip += 16) {
    for (int d = 0; d < NUM_OUT_FRAGS; ++d) {
      WmmaAccum accum;
      for (int i = 0; i < 8; ++i) {
        const int row = strip + accum_row(lane_idx(), i);
        accum.x[i] = smem_load(o_smem + (row * O_STRIDE + d * 16 + accum_col(lane_idx(), i)));
      }
      for (int n = 0; n < NUM_FRAGS; ++n) {
        WmmaA<Element> p_frag;
        WmmaBRow<Element> v_frag;
        wmma_load_a(p_frag, p_smem + (strip * P_STRIDE + n * 16), P_STRIDE);
        wmma_load_b_row(v_frag, v_smem + (n * 16 * v_stride + d * 16), v_stride);
        wmma_mma(accum, p_frag, v_frag);
      }
      for (int i = 0; i < 8; ++i) {
        const int row = strip + accum_row(lane_idx(), i);
        smem_store(o_smem + (row * O_STRIDE + d * 16 + accum_col(lane_idx(), i)), accum.x[i]);
      }
    }
  }
  block_sync();  // orders warp 0's output before every warp takes its strip back
#pragma unroll
  for (int d = 0; d < NUM_OUT_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = warp_strip + accum_row(lane_idx(), i);
      out[d].x[i] = smem_load(o_smem + (row * O_STRIDE + d * 16 + accum_col(lane_idx(), i)));
    }
  }
}
//@end
//@if gate ds dv dk dq

// Scores [seqlen_q, seqlen_k] of a batch and head of a backward kernel, from the first query and
// key of its sequence on. Rows of `scores` follow each other as those of lse do, with as many keys
// each as the longest sequence has.
struct GateScores {
  GmemPtr<float> scores;
  int keys_of_row;
};

template <bool OWNS_KEYS>
FC_DEVICE GateScores gate_scores_of(const AttnParams& p, BlockCoord block, int head_idx) {
  const int first_row = PACKED ? query_rows<OWNS_KEYS>(p, block.batch_idx).begin : 0;
  block.head_idx = head_idx;
  return {p.gate.gate_scores + lse_offset(p, block, first_row) * p.seqlen_k, p.seqlen_k};
}

// A warp's 16 rows of a tile of P or dS, from (row, col) on: written out by gate ds, taken over by
// the others. `p` is what the sequence sees. A lane's rows are queries, or keys where the kernel
// OWNS_KEYS.
template <bool OWNS_KEYS, int NUM_FRAGS>
FC_DEVICE void gate_tile(WmmaAccum (&x)[NUM_FRAGS], const GateScores& gate, const AttnParams& p,
                         int row, int col) {
  for (int n = 0; n < NUM_FRAGS; ++n) {
    for (int i = 0; i < 8; ++i) {
      const int own = row + accum_row(lane_idx(), i);
      const int other = col + n * 16 + accum_col(lane_idx(), i);
      const int query = OWNS_KEYS ? other : own;
      const int key = OWNS_KEYS ? own : other;
      const bool inside = query < p.seqlen_q && key < p.seqlen_k;
      const auto at = gate.scores + (int64_t(query) * gate.keys_of_row + key);
//@if gate ds
      if (inside) gmem_store(at, x[n].x[i]);
//@else
      x[n].x[i] = inside ? gmem_load(GmemPtr<const float>{at.address}) : 0.0f;
//@end
    }
  }
}
//@end
//@if gate dv

// The P^T of a tile as operand of dV.
template <int NUM_FRAGS>
FC_DEVICE void gate_probs(WmmaA<Element> (&probs)[NUM_FRAGS], const GateScores& gate,
                          const AttnParams& p, int row, int col) {
  WmmaAccum given[NUM_FRAGS];
  gate_tile<true>(given, gate, p, row, col);
  for (int n = 0; n < NUM_FRAGS; ++n) wmma_accum_to_a(probs[n], given[n]);
}
//@end
