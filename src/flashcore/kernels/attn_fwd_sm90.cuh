// attn_fwd_sm90.cuh - fused attention forward for Hopper: TMA loads on mbarriers, WGMMA with the
// accumulators in registers, a producer warp and NUM_CONSUMERS warpgroups of 64 query rows each.
//
//   S = scale * Q K^T      P = softmax(S + mask)      O = P V      lse = log(sum(exp(S + mask)))
//
// The algorithm is attn_fwd_wmma.cuh's (read that first); what differs is when things happen
// (FlashAttention-3, arXiv:2407.08608). A warpgroup issues S = Q K^T of the next key tile, then O
// += P V of the current one, and computes the next softmax while the tensor cores work on both. Two
// or three warpgroups take turns at issuing, so that one's softmax runs under another's products.
// Blocks are persistent: they walk over row tiles (tile/schedule_sm90.cuh), keys from last to
// first, the producer running ahead as far as the stages of K and V allow.
#pragma once

#include "prims_sm90.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/schedule_sm90.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"
#include "tile/pipeline_sm90.cuh"
#include "tile/schedule_varlen.cuh"
//@if gate
#include "tile/gates.cuh"
//@end

struct AttnSm90Params {
  TensorMap q_map;  // boxes of BLOCK_M rows x CHUNK columns of q
  TensorMap k_map;  // boxes of BLOCK_N rows x CHUNK columns of k
  TensorMap v_map;  // the same of v
  TensorMap o_map;  // boxes of 64 rows x CHUNK columns of out
  AttnParams attn;
  int32_t num_heads_and_batches;  // num_heads_q * batch
};

// A tile in shared memory is a row of column chunks, each all rows x CHUNK elements, in rows of
// CHUNK_BYTES that TMA swizzles. Columns past head_dim are zeros that TMA fills in.
constexpr int CHUNK = HEAD_DIM % 64 == 0 && HEAD_DIM_V % 64 == 0 ? 64 : 32;
constexpr int CHUNK_BYTES = CHUNK * 2;
constexpr int QK_CHUNKS = (HEAD_DIM + CHUNK - 1) / CHUNK;
constexpr int V_CHUNKS = (HEAD_DIM_V + CHUNK - 1) / CHUNK;
constexpr int KEY_FRAGS = BLOCK_N / 16;
constexpr int OUT_FRAGS = V_CHUNKS * CHUNK / 16;

constexpr int NUM_CONSUMERS = BLOCK_M / 64;
constexpr int Q_ELEMENTS = BLOCK_M * QK_CHUNKS * CHUNK;
constexpr int K_ELEMENTS = BLOCK_N * QK_CHUNKS * CHUNK;  // of one stage
constexpr int V_ELEMENTS = BLOCK_N * V_CHUNKS * CHUNK;
constexpr int O_ELEMENTS = BLOCK_M * V_CHUNKS * CHUNK;

// O leaves through a buffer of its own, or through Q's where that would not fit beside the stages.
constexpr int K_OFFSET = Q_ELEMENTS * 2;
constexpr int V_OFFSET = K_OFFSET + NUM_STAGES * K_ELEMENTS * 2;
constexpr int O_OFFSET = SEPARATE_O ? V_OFFSET + NUM_STAGES * V_ELEMENTS * 2 : 0;
constexpr int BARRIERS_OFFSET =
    V_OFFSET + NUM_STAGES * V_ELEMENTS * 2 + (SEPARATE_O ? O_ELEMENTS * 2 : 0);
constexpr int FEED_OFFSET = BARRIERS_OFFSET + NUM_BARRIERS * 8;
static_assert(SMEM_BYTES == FEED_OFFSET + FEED_BYTES,
              "the plan and the kernel disagree on shared memory");
static_assert(SEPARATE_O || O_ELEMENTS <= Q_ELEMENTS, "O does not fit into Q's buffer");

enum NamedBarrier {
  TURN_BARRIER = 1,                           // + consumer: its turn at the tensor cores
  STORE_BARRIER = TURN_BARRIER + NUM_CONSUMERS  // + consumer: the warps of a warpgroup
};

struct Buffers {
  SmemPtr<Element> q, k, v, o;
  Feed feed;  // of row tiles, where they are dealt out
};

// The producer: one thread fills Q and the stages of K and V for one row tile after the other.
FC_DEVICE void produce(const AttnSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  PipelineState k_state, v_state;
  int q_parity = 0;
  BoxOrigin q_box, k_box, v_box;  // of the sequence

  const auto load_k = [&](const BlockCoord& block, int n_block) {
    const auto full = bar.k_full + k_state.stage();
    mbar_wait(bar.k_empty + k_state.stage(), k_state.parity() ^ 1);
    mbar_arrive_expect_tx(full, K_ELEMENTS * 2);
    for (int c = 0; c < QK_CHUNKS; ++c) {
      tma_load(smem.k + (k_state.stage() * K_ELEMENTS + c * BLOCK_N * CHUNK), params.k_map, full,
               c * CHUNK, k_box.row + n_block * BLOCK_N, block.head_idx_kv, k_box.batch);
    }
    ++k_state.count;
  };
  const auto load_v = [&](const BlockCoord& block, int n_block) {
//@if gate qk softmax
    return;  // there is no P V
//@end
    const auto full = bar.v_full + v_state.stage();
    mbar_wait(bar.v_empty + v_state.stage(), v_state.parity() ^ 1);
    mbar_arrive_expect_tx(full, V_ELEMENTS * 2);
    for (int c = 0; c < V_CHUNKS; ++c) {
      tma_load(smem.v + (v_state.stage() * V_ELEMENTS + c * BLOCK_N * CHUNK), params.v_map, full,
               c * CHUNK, v_box.row + n_block * BLOCK_N, block.head_idx_kv, v_box.batch);
    }
    ++v_state.count;
  };

  for (auto tile = row_tiles<false>(p, smem.feed); !tile.done(p, params.num_heads_and_batches);
       tile.advance(p)) {
    const BlockCoord block = tile.coord(p);
    const auto& own = sequence_params(p, block);
    q_box = query_box(p, block);
    k_box = key_box(p, block, p.k_rows_per_batch);
    v_box = key_box(p, block, p.v_rows_per_batch);
//@if gate tile
    const KeyRange keys = gate_last_tile(key_range(own, block.m_begin));
//@else
    const KeyRange keys = key_range(own, block.m_begin);
//@end
    mbar_wait(bar.q_empty, q_parity ^ 1);
    mbar_arrive_expect_tx(bar.q_full, Q_ELEMENTS * 2);
    for (int c = 0; c < QK_CHUNKS; ++c) {
      tma_load(smem.q + c * BLOCK_M * CHUNK, params.q_map, bar.q_full, c * CHUNK,
               q_box.row + block.m_begin, block.head_idx, q_box.batch);
    }
    q_parity ^= 1;
    // In the order of use: Q K^T of a tile is issued before P V of the tile visited before it.
    for (int n_block = keys.n_block_end - 1; n_block >= keys.n_block_begin; --n_block) {
      load_k(block, n_block);
      if (n_block < keys.n_block_end - 1) load_v(block, n_block + 1);
    }
    if (keys.n_block_begin < keys.n_block_end) load_v(block, keys.n_block_begin);
  }
}

// What one consumer warpgroup carries from key tile to key tile.
struct Consumer {
  int index;
  int warp_row;  // first of this warp's 16 query rows
  float scale_log2;
  WmmaAccum out[OUT_FRAGS];
  WmmaA<Element> probs[KEY_FRAGS];  // of the tile whose P V is not issued yet
  OnlineSoftmax softmax;
  PipelineState k_state, v_state;
  GmemPtr<const MaskElement> mask_gmem;
//@if gate
  BlockCoord block;
//@end
};

// S = Q K^T of a warpgroup's 64 rows, issued.
FC_DEVICE void issue_scores(WmmaAccum (&scores)[KEY_FRAGS], SmemPtr<Element> q_smem,
                            SmemPtr<Element> k_smem) {
  const WgmmaDesc q_desc = wgmma_desc<CHUNK_BYTES>(q_smem, 0);
  const WgmmaDesc k_desc = wgmma_desc<CHUNK_BYTES>(k_smem, 0);
#pragma unroll
  for (int d = 0; d < QK_CHUNKS * CHUNK; d += 16) {
    const int chunk = d / CHUNK;
    const int col_bytes = d % CHUNK * 2;
    wgmma_ss<Element>(scores, q_desc + (chunk * BLOCK_M * CHUNK_BYTES + col_bytes),
                      k_desc + (chunk * BLOCK_N * CHUNK_BYTES + col_bytes), d > 0);
  }
}

// O += P V of a warpgroup's 64 rows, issued.
FC_DEVICE void issue_output(WmmaAccum (&out)[OUT_FRAGS], const WmmaA<Element> (&probs)[KEY_FRAGS],
                            SmemPtr<Element> v_smem) {
  const WgmmaDesc v_desc = wgmma_desc<CHUNK_BYTES>(v_smem, BLOCK_N * CHUNK_BYTES);
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
    wgmma_rs<Element>(out, probs[n], v_desc + n * 16 * CHUNK_BYTES, true);
  }
}

// One key tile: S = Q K^T, and (unless FIRST) P V of the tile visited before it, are under way
// together; then the softmax of S.
//@if gate qk softmax
template <bool, bool MASKED, bool FIRST = true>  // there is no P V
//@else
template <bool FIRST, bool MASKED>
//@end
FC_DEVICE void key_tile(Consumer& c, const AttnParams& p, const Barriers& bar, const Buffers& smem,
                        int n_block) {
  WmmaAccum scores[KEY_FRAGS];
  mbar_wait(bar.k_full + c.k_state.stage(), c.k_state.parity());
  if (PING_PONG && !FIRST) named_barrier_sync(TURN_BARRIER + c.index, 256);
  wgmma_fence();
  issue_scores(scores, smem.q + c.index * 64 * CHUNK, smem.k + c.k_state.stage() * K_ELEMENTS);
  wgmma_commit();
  if constexpr (!FIRST) {
    mbar_wait(bar.v_full + c.v_state.stage(), c.v_state.parity());
    wgmma_fence();
    issue_output(c.out, c.probs, smem.v + c.v_state.stage() * V_ELEMENTS);
    wgmma_commit();
    if (PING_PONG) named_barrier_arrive(TURN_BARRIER + (c.index + 1) % NUM_CONSUMERS, 256);
  }
  wgmma_wait<FIRST ? 0 : 1>();
  wgmma_hold(scores);
  release(bar.k_empty, c.k_state);
//@if gate qk
  gate_store_scores(scores, p, c.block, c.warp_row, n_block * BLOCK_N);
  return;
//@end

  float rescale[2];
//@if gate pv
  const bool moved = false;
  gate_load_probs(scores, p, c.block, c.warp_row, n_block * BLOCK_N);
//@else
  if constexpr (MASKED) mask_scores(scores, p, c.mask_gmem, c.warp_row, n_block * BLOCK_N);
  const bool moved = softmax_step<LAZY_RESCALE>(scores, c.softmax, rescale, c.scale_log2);
//@end
//@if gate softmax
  gate_store_scores(scores, p, c.block, c.warp_row, n_block * BLOCK_N);
  gate_store_rows(c.softmax, p, c.block, c.warp_row, n_block, c.scale_log2);
  return;
//@end

  if constexpr (!FIRST) {
    wgmma_wait<0>();
    wgmma_hold(c.out);
    release(bar.v_empty, c.v_state);
    if (moved) rescale_output(c.out, rescale);
  }
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) wmma_accum_to_a(c.probs[n], scores[n]);
}

// P V of the key tile visited last.
FC_DEVICE void last_output(Consumer& c, const Barriers& bar, const Buffers& smem) {
//@if gate qk softmax
  return;
//@end
  mbar_wait(bar.v_full + c.v_state.stage(), c.v_state.parity());
  wgmma_fence();
  issue_output(c.out, c.probs, smem.v + c.v_state.stage() * V_ELEMENTS);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(c.out);
  release(bar.v_empty, c.v_state);
}

// Divides by the row sums and sends a warpgroup's 64 rows of O on their way by TMA, which clips
// rows and columns past the tensor's end; writes their lse.
FC_DEVICE void store_output(Consumer& c, const AttnSm90Params& params, const Barriers& bar,
                            const Buffers& smem, const BlockCoord& block) {
  const auto& p = sequence_params(params.attn, block);
  float inverse_sum[2];
  finish_softmax(c.softmax, p, lse_offset(p, block, c.warp_row), p.seqlen_q - c.warp_row,
                 c.scale_log2, inverse_sum);

  const bool leads = warp_idx() % 4 == 0 && elect_lane();
  const auto o_smem = smem.o + c.index * 64 * CHUNK;
  if (SEPARATE_O && leads) tma_store_wait_read<0>();  // of the last tile's O
  named_barrier_sync(STORE_BARRIER + c.index, 128);   // orders that, or the last read of Q, before:
  const int row = warp_idx() % 4 * 16 + lane_idx() % 16;
#pragma unroll
  for (int d = 0; d < OUT_FRAGS; ++d) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float scale = inverse_sum[row_of_element(i)];
      packed[i / 2] = pack2<Element>(c.out[d].x[i] * scale, c.out[d].x[i + 1] * scale);
    }
    const int chunk = d * 16 / CHUNK;
    const int col = swizzled_col<CHUNK_BYTES>(row, d * 16 % CHUNK + lane_idx() / 16 * 8);
    stmatrix_x4(o_smem + (chunk * BLOCK_M * CHUNK + row * CHUNK + col), packed);
  }
  fence_proxy_async();
  named_barrier_sync(STORE_BARRIER + c.index, 128);  // orders the writes above before the stores
  if (leads) {
    const BoxOrigin box = query_box(params.attn, block);
    for (int chunk = 0; chunk < V_CHUNKS; ++chunk) {
      tma_store(params.o_map, o_smem + chunk * BLOCK_M * CHUNK, chunk * CHUNK,
                box.row + block.m_begin + c.index * 64, block.head_idx, box.batch);
    }
    tma_store_commit();
    if (!SEPARATE_O) {
      tma_store_wait_read<0>();
      mbar_arrive(bar.q_empty);
    }
  }
}

// A consumer warpgroup: 64 query rows of every row tile of this block.
FC_DEVICE void consume(const AttnSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  Consumer c;
  c.index = warp_idx() / 4 - 1;
  c.scale_log2 = SCORES_ARE_LOG2 ? 1.0f : p.softmax_scale_log2;
  int q_parity = 0;
  // The first turn is consumer 0's: the last consumer hands it over.
  if (PING_PONG && c.index == NUM_CONSUMERS - 1) named_barrier_arrive(TURN_BARRIER, 256);

  for (auto tile = row_tiles<true>(p, smem.feed); !tile.done(p, params.num_heads_and_batches);
       tile.advance(p)) {
    const BlockCoord block = tile.coord(p);
    const auto& own = sequence_params(p, block);
//@if gate tile
    const KeyRange keys = gate_last_tile(key_range(own, block.m_begin));
//@else
    const KeyRange keys = key_range(own, block.m_begin);
//@end
    const int group_row = block.m_begin + c.index * 64;
    const UnmaskedRange unmasked = unmasked_range(own, group_row);
    c.warp_row = group_row + warp_idx() % 4 * 16;
    c.mask_gmem =
        p.mask + (block.batch_idx * p.mask_batch_stride + block.head_idx * p.mask_head_stride);
    c.softmax = {{NEG_INF, NEG_INF}, {0.0f, 0.0f}};
//@if gate
    c.block = block;
//@end
//@if gate pv
    c.softmax = {{0.0f, 0.0f}, {0.25f, 0.25f}};  // four lanes' shares add up to 1: no normalisation
//@end
#pragma unroll
    for (int d = 0; d < OUT_FRAGS; ++d) wmma_fill(c.out[d], 0.0f);

    mbar_wait(bar.q_full, q_parity);
    q_parity ^= 1;
    int n_block = keys.n_block_end - 1;
    if (n_block >= keys.n_block_begin) {
      key_tile<true, true>(c, own, bar, smem, n_block);
      for (--n_block; n_block >= max_i(unmasked.end, keys.n_block_begin); --n_block) {
        key_tile<false, true>(c, own, bar, smem, n_block);
      }
      for (; n_block >= max_i(unmasked.begin, keys.n_block_begin); --n_block) {
        key_tile<false, false>(c, own, bar, smem, n_block);
      }
      if (HAS_WINDOW_LEFT) {
        for (; n_block >= keys.n_block_begin; --n_block) {
          key_tile<false, true>(c, own, bar, smem, n_block);
        }
      }
    }
    if (SEPARATE_O) {
      // Without a key tile, lanes may still wait for q_full, whose next phase must not pass them.
      warp_sync();
      if (lane_idx() == 0) mbar_arrive(bar.q_empty);
    }
    if (keys.n_block_begin < keys.n_block_end) last_output(c, bar, smem);
    store_output(c, params, bar, smem, block);
  }
  // Shared memory must outlive the stores that read it.
  if (warp_idx() % 4 == 0 && elect_lane()) tma_store_wait_read<0>();
}

FC_KERNEL(attn_fwd_sm90, (NUM_CONSUMERS + 1) * 128, MIN_BLOCKS)(FC_PARAM(AttnSm90Params) params) {
  const Buffers smem = {
      smem_view<Element>(0, Q_ELEMENTS, "q_smem"),
      smem_view<Element>(K_OFFSET, NUM_STAGES * K_ELEMENTS, "k_smem"),
      smem_view<Element>(V_OFFSET, NUM_STAGES * V_ELEMENTS, "v_smem"),
      smem_view<Element>(O_OFFSET, O_ELEMENTS, "o_smem"),
      PACKED ? feed_at(FEED_OFFSET) : Feed(),
  };
  const Barriers bar = barriers(BARRIERS_OFFSET);
  if (thread_idx() == 0) {
    if (PACKED) init_feed(smem.feed, NUM_CONSUMERS * 4 + 1);
    init_barriers(bar, NUM_CONSUMERS * 4, SEPARATE_O ? NUM_CONSUMERS * 4 : NUM_CONSUMERS);
  }
  block_sync();  // orders the initialisation before every use

  if (warp_idx() < 4) {
    lower_registers<PRODUCER_REGISTERS>();
    if (warp_idx() == 0 && elect_lane()) produce(params, bar, smem);
    if (PACKED && warp_idx() == 1) schedule_tiles(params.attn, smem.feed);
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    consume(params, bar, smem);
  }
}
