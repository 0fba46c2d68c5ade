// attn_fwd_wmma.cuh - fused attention forward for every GPU from sm_75 on: tensor cores by WMMA
// 16x16x16, float32 softmax, K and V double-buffered by cp.async where the GPU has it.
//
//   S = scale * Q K^T      P = softmax(S + mask)      O = P V      lse = log(sum(exp(S + mask)))
//
// One block computes BLOCK_M query rows of one head, 16 rows a warp, and walks over the keys
// BLOCK_N at a time (FlashAttention-2, arXiv:2307.08691, algorithm 1). The output tile is
// partitioned over warps by rows: a warp's scores, probabilities, running max and sum and output
// never leave its registers, so every output element has one owner and no atomics are needed. Under
// STREAM_K, where rows are few, blocks share the keys of a row tile, in pieces that the device cuts
// (tile/stream_k.cuh), and whoever ends the last one adds up (tile/shares.cuh). Read next:
// tile/softmax.cuh, tile/mask.cuh, tile/copy.cuh, and prims.cuh for the primitives.
#pragma once

#include "prims.cuh"
#include "tile/band.cuh"
#include "tile/copy.cuh"
#include "tile/folded_rows.cuh"
#include "tile/mask.cuh"
#include "tile/max_score.cuh"
#include "tile/params.cuh"
#include "tile/rows.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/shares.cuh"
#include "tile/softmax.cuh"
#include "tile/stream_k.cuh"
#include "fwd_wmma/float8_wmma.cuh"
#include "fwd_wmma/totals_wmma.cuh"
//@if gate
#include "tile/gates.cuh"
//@end

constexpr int QK_FRAGS = padded_cols(HEAD_DIM) / 16;    // along head_dim of q and k
constexpr int KEY_FRAGS = BLOCK_N / 16;                 // along the keys of a tile
constexpr int OUT_FRAGS = padded_cols(HEAD_DIM_V) / 16; // along head_dim of v and out

// Shared memory, in elements. Q's tile is reused for O, row by row, so both have the wider stride.
constexpr int QO_STRIDE = smem_stride(HEAD_DIM > HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V);
constexpr int K_STRIDE = smem_stride(HEAD_DIM);
constexpr int V_STRIDE = smem_stride(HEAD_DIM_V);
constexpr int QO_ELEMENTS = BLOCK_M * QO_STRIDE;
constexpr int K_ELEMENTS = BLOCK_N * K_STRIDE;  // of one stage
constexpr int V_ELEMENTS = BLOCK_N * V_STRIDE;
constexpr int ELEMENT_BYTES = int(sizeof(Element));
// Of 8-bit caches the stages are bytes, and there is one tile of K and of V that they become.
constexpr int NUM_TILES = FLOAT8 ? 1 : NUM_STAGES;
constexpr int K_LOAD_BYTES = FLOAT8 ? BLOCK_N * HEAD_DIM : 0;  // of one stage
constexpr int V_LOAD_BYTES = FLOAT8 ? BLOCK_N * HEAD_DIM_V : 0;
constexpr int LOADS_OFFSET =
    (QO_ELEMENTS + NUM_TILES * (K_ELEMENTS + V_ELEMENTS)) * ELEMENT_BYTES;
constexpr int TILE_BYTES = LOADS_OFFSET + NUM_STAGES * (K_LOAD_BYTES + V_LOAD_BYTES);
// Under STREAM_K the block's walk over its pieces, and whether it handed over the last one of a
// row tile.
constexpr int PIECES_INTS = STREAM_K ? StreamWalk::INTS + 1 : 0;
//@if gate pv_serial
static_assert(SMEM_BYTES == TILE_BYTES + GATE_SERIAL_BYTES,
              "kernels/fwd_wmma/plan.py and the kernel disagree on shared memory");
//@else
static_assert(SMEM_BYTES == TILE_BYTES + PIECES_INTS * 4,
              "kernels/fwd_wmma/plan.py and the kernel disagree on shared memory");
//@end
static_assert(BLOCK_M == NUM_WARPS * 16, "a warp computes 16 rows");
static_assert(!STREAM_K || BLOCK_M == 64, "the whole block hands over, and adds up");
static_assert(!FOLDS_PACKED || STREAM_K, "row_tile knows one head at a time");
// Of partial results, that a thread has under way at once: as many as registers hold.
constexpr int THREAD_REGISTERS = 65536 / (MIN_BLOCKS * NUM_WARPS * 32);
constexpr int PARTIAL_PACKETS = THREAD_REGISTERS >= 160 ? 16 : THREAD_REGISTERS >= 128 ? 12 : 8;

// scores = Q K^T of one warp's 16 rows and one key tile.
FC_DEVICE void compute_scores(WmmaAccum (&scores)[KEY_FRAGS], SmemPtr<Element> q_smem,
                              SmemPtr<Element> k_smem) {
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) wmma_fill(scores[n], 0.0f);
#pragma unroll
  for (int d = 0; d < QK_FRAGS; ++d) {
    WmmaA<Element> q_frag;
    wmma_load_a(q_frag, q_smem + d * 16, QO_STRIDE);
#pragma unroll
    for (int n = 0; n < KEY_FRAGS; ++n) {
      WmmaBCol<Element> k_frag;
      wmma_load_b_col(k_frag, k_smem + (n * 16 * K_STRIDE + d * 16), K_STRIDE);
      wmma_mma(scores[n], q_frag, k_frag);
    }
  }
}

// out += P V of one warp's 16 rows and one key tile.
FC_DEVICE void accumulate_output(WmmaAccum (&out)[OUT_FRAGS], const WmmaAccum (&probs)[KEY_FRAGS],
                                 SmemPtr<Element> v_smem) {
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
    WmmaA<Element> p_frag;
    wmma_accum_to_a(p_frag, probs[n]);
#pragma unroll
    for (int d = 0; d < OUT_FRAGS; ++d) {
      WmmaBRow<Element> v_frag;
      wmma_load_b_row(v_frag, v_smem + (n * 16 * V_STRIDE + d * 16), V_STRIDE);
      wmma_mma(out[d], p_frag, v_frag);
    }
  }
}

// Divides by the row sums and writes 16 rows of O (through this warp's rows of the Q tile, so that
// global stores are 16 bytes wide) and their lse.
FC_DEVICE void store_output(WmmaAccum (&out)[OUT_FRAGS], const OnlineSoftmax& state,
                            const AttnParams& params, SmemPtr<Element> o_smem) {
  // Anew: cheaper than registers held over the loop.
  const BlockCoord block = row_tile(params, opaque(block_idx()));
  const auto& p = sequence_params(params, block);
  const int warp_row = block.m_begin + warp_idx() * 16;
  const int num_valid_rows = p.seqlen_q - warp_row;
  float inverse_sum[2];
  finish_softmax(state, p, lse_offset(p, block, warp_row), num_valid_rows, block.head_idx,
                 inverse_sum);
  if (RETURNS_MAX_SCORE) raise_max_score(state, p, block, warp_row);
  warp_sync();  // orders every lane's last read of the Q rows before the writes below
#pragma unroll
  for (int d = 0; d < OUT_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float scale = inverse_sum[row_of_element(i)];
      Packet<4> pair;
      pair.word[0] = pack2<Element>(out[d].x[i] * scale, out[d].x[i + 1] * scale);
      const int row = accum_row(lane_idx(), i);
      const int col = d * 16 + accum_col(lane_idx(), i);
      smem_store_packet(o_smem + (row * QO_STRIDE + col), pair);
    }
  }
  warp_sync();  // orders the writes above before store_rows reads them from other lanes
  const auto out_gmem = p.tensors.out + out_offset(p, block, warp_row);
  store_rows<HEAD_DIM_V, QO_STRIDE>(out_gmem, out_row_stride(p), o_smem, num_valid_rows);
}

FC_DEVICE SmemPtr<int32_t> pieces_smem() {
  return smem_view<int32_t>(TILE_BYTES, PIECES_INTS, "pieces_smem");
}

// Hands over what came of a block's piece, and adds up the row tile if it was the last one.
FC_DEVICE void store_piece(const OnlineSoftmax& state, const WmmaAccum (&out)[OUT_FRAGS],
                           const AttnParams& params) {
  // Anew: cheaper than registers held over the loop.
  const BlockCoord block = StreamWalk(pieces_smem()).coord(params, {});
  const auto& p = sequence_params(params, block);
  if (RETURNS_MAX_SCORE) raise_max_score(state, p, block, block.m_begin + warp_idx() * 16);
  hand_over_partial<PARTIAL_PACKETS>(p, block, 0, state, out, softmax_scale_log2(p),
                                     [] { block_sync(); }, pieces_smem() + StreamWalk::INTS);
}

// Computes a row tile's attention, to all of its keys or under STREAM_K to those of a piece.
FC_DEVICE void attend(const AttnParams& params, const BlockCoord& block) {
  // Set-up: which rows, which keys, where.
  const auto& p = sequence_params(params, block);
  const Range keys = own_keys(p, block);
  const int warp_row = block.m_begin + warp_idx() * 16;
  const auto q_gmem =
      p.tensors.q + (block.batch_idx * p.strides.q.batch + block.head_idx * p.strides.q.head);
  const auto k_gmem = keys_of_head(block, p.tensors.k, p.strides.k);
  const auto v_gmem = keys_of_head(block, p.tensors.v, p.strides.v);
  const auto mask_gmem = mask_of(p, block.batch_idx, block.head_idx);

  const auto qo_smem = smem_view<Element>(0, QO_ELEMENTS, "qo_smem");
  const auto k_smem =
      smem_view<Element>(QO_ELEMENTS * ELEMENT_BYTES, NUM_TILES * K_ELEMENTS, "k_smem");
  const auto v_smem = smem_view<Element>((QO_ELEMENTS + NUM_TILES * K_ELEMENTS) * ELEMENT_BYTES,
                                         NUM_TILES * V_ELEMENTS, "v_smem");
  const auto k_bytes_smem =
      smem_view<float8>(LOADS_OFFSET, NUM_STAGES * K_LOAD_BYTES, "k_bytes_smem");
  const auto v_bytes_smem = smem_view<float8>(LOADS_OFFSET + NUM_STAGES * K_LOAD_BYTES,
                                              NUM_STAGES * V_LOAD_BYTES, "v_bytes_smem");
  const auto warp_qo_smem = qo_smem + warp_idx() * 16 * QO_STRIDE;

  // Starts the copy of one key tile into its stage, as one cp.async group; past the end an empty
  // group.
  const auto load_keys = [&](int n_block) {
    if (n_block < keys.end) {
      const int stage = n_block % NUM_STAGES;
      const int key_begin = n_block * BLOCK_N;
      const auto k_rows = rows_of_keys(p, block, k_gmem, p.strides.k);
      const auto v_rows = rows_of_keys(p, block, v_gmem, p.strides.v);
      if constexpr (FLOAT8) {
        load_tile<BLOCK_N, HEAD_DIM, HEAD_DIM>(k_bytes_smem + stage * K_LOAD_BYTES, k_rows,
                                               key_begin, p.seqlen_k);
        load_tile<BLOCK_N, HEAD_DIM_V, HEAD_DIM_V>(v_bytes_smem + stage * V_LOAD_BYTES, v_rows,
                                                   key_begin, p.seqlen_k);
      } else {
        load_tile<BLOCK_N, HEAD_DIM, K_STRIDE>(k_smem + stage * K_ELEMENTS, k_rows, key_begin,
                                               p.seqlen_k);
        load_tile<BLOCK_N, HEAD_DIM_V, V_STRIDE>(v_smem + stage * V_ELEMENTS, v_rows, key_begin,
                                                 p.seqlen_k);
      }
    }
    cp_async_commit();
  };

  // Load Q, which joins the first group of K and V. Nothing is loaded when no key can be seen.
  if (keys.begin < keys.end) {
    zero_padding<BLOCK_M, HEAD_DIM, QO_STRIDE>(qo_smem);
    zero_padding<NUM_TILES * BLOCK_N, HEAD_DIM, K_STRIDE>(k_smem);
    zero_padding<NUM_TILES * BLOCK_N, HEAD_DIM_V, V_STRIDE>(v_smem);
    load_tile<BLOCK_M, HEAD_DIM, QO_STRIDE>(qo_smem, rows_of_q(p, q_gmem), block.m_begin,
                                            p.seqlen_q);
    for (int ahead = 0; ahead < NUM_STAGES - 1; ++ahead) load_keys(keys.begin + ahead);
  }

  WmmaAccum out[OUT_FRAGS];
#pragma unroll
  for (int d = 0; d < OUT_FRAGS; ++d) wmma_fill(out[d], 0.0f);
  OnlineSoftmax state = {{NEG_INF, NEG_INF}, {0.0f, 0.0f}};
  Totals<OUT_FRAGS> totals;
  const float scale_log2 = softmax_scale_log2(p);

  for (int n_block = keys.begin; n_block < keys.end; ++n_block) {
    // K and V of this tile arrive; the next tile's copy starts into the stage read one step ago.
    if (NUM_STAGES == 1) {
      block_sync();  // orders the last step's reads of the stage before the copy below
      load_keys(n_block);
    }
    cp_async_wait<NUM_STAGES == 1 ? 0 : NUM_STAGES - 2>();
    block_sync();  // orders every thread's arrived copies (and zero_padding) before the reads below
    if (NUM_STAGES > 1) load_keys(n_block + NUM_STAGES - 1);
    const int stage = n_block % NUM_TILES;
    const int key_begin = n_block * BLOCK_N;
    if constexpr (FLOAT8) {  // by now nobody reads the last step's tile
      const int loaded = n_block % NUM_STAGES;
      widen_tile<BLOCK_N, HEAD_DIM, K_STRIDE>(k_smem, k_bytes_smem + loaded * K_LOAD_BYTES);
      widen_tile<BLOCK_N, HEAD_DIM_V, V_STRIDE>(v_smem, v_bytes_smem + loaded * V_LOAD_BYTES);
      block_sync();  // orders all threads' widened elements before the reads below
    }

    // S = Q K^T
    WmmaAccum scores[KEY_FRAGS];
    compute_scores(scores, warp_qo_smem, k_smem + stage * K_ELEMENTS);
//@if gate qk
    gate_store_scores(scores, p, block, warp_row, key_begin);
    continue;
//@end

    // P = softmax(S), O rescaled to the new row_max
//@if gate pv
    gate_load_probs(scores, p, block, warp_row, key_begin);
//@else
    mask_scores(scores, p, mask_gmem, warp_row, key_begin);
    float rescale[2];
    softmax_step<false>(scores, state, rescale, scale_log2);
    rescale_output(out, rescale);
//@end
//@if gate softmax
    gate_store_scores(scores, p, block, warp_row, key_begin);
    gate_store_rows(state, p, block, warp_row, n_block, scale_log2);
    continue;
//@end

    // O = O + P V
//@if gate pv_serial
    gate_accumulate_serially(out, scores, v_smem + stage * V_ELEMENTS, V_STRIDE);
//@else
    accumulate_output(out, scores, v_smem + stage * V_ELEMENTS);
//@end
    if (totals.ends_chunk(n_block)) {
      totals.add(state, out, scale_log2);
#pragma unroll
      for (int d = 0; d < OUT_FRAGS; ++d) wmma_fill(out[d], 0.0f);
    }
//@if gate tile
    cp_async_wait<0>();
    break;
//@end
  }
//@if gate pv
  state = {{0.0f, 0.0f}, {0.25f, 0.25f}};  // four lanes' shares add up to 1: no normalisation
//@end

  totals.end(state, out, scale_log2);
  if constexpr (STREAM_K) {
    store_piece(state, out, params);
  } else {
    store_output(out, state, params, warp_qo_smem);
  }
}

// The pieces of a block, one after the other.
FC_DEVICE void attend_in_pieces(const AttnParams& params) {
  if (warp_idx() == 0) {
    const StreamWalk walk(params);
    if (lane_idx() == 0) walk.keep(pieces_smem());
  }
  for (;;) {
    block_sync();  // hands the walk on; orders the last piece's reads of tiles before new copies
    const StreamWalk walk(pieces_smem());
    if (walk.done(params, {})) return;
    attend(params, walk.coord(params, {}));
    block_sync();  // orders all reads of the walk before it moves on
    if (thread_idx() == 0) {
      StreamWalk next(pieces_smem());
      next.advance(params, {});
      next.keep(pieces_smem());
    }
  }
}

FC_KERNEL(attn_fwd_wmma, NUM_WARPS * 32, MIN_BLOCKS)(const AttnParams params) {
  if constexpr (STREAM_K) {
    attend_in_pieces(params);
  } else {
    const BlockCoord block = row_tile(params, block_idx());
    if (PACKED && block.m_begin < 0) return;
    attend(params, block);
  }
}
