// bwd_mask_sm90/bwd_dmask_sm90.cuh - the kernel of an additive mask's gradient: which tiles there
// are, which scores each is added to, where in shared memory what lies, who loads it, and how a sum
// leaves. Mirrored by kernels/bwd_mask_sm90/plan.py.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/smem_tile.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/mask_tile_sm90.cuh"
#include "bwd_sm90/bwd_delta_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"

constexpr int NUM_CONSUMERS = BLOCK_M / 64;  // warpgroups of 64 queries
constexpr int KEY_FRAGS = BLOCK_N / 16;

// A stage holds a chunk of columns: BLOCK_M rows of Q or dO, then BLOCK_N rows of K or V.
using Stage = SmemTile<BLOCK_M + BLOCK_N, CHUNK>;
constexpr int MASK_OFFSET = NUM_STAGES * Stage::BYTES;
constexpr int SUMS_OFFSET =
    MASK_OFFSET + NUM_CONSUMERS * 4 * MASK_WARP_ELEMENTS * MASK_ELEMENT_BYTES;
constexpr int SUMS_FLOATS = SUMS_ROWS ? NUM_CONSUMERS * 4 * BLOCK_N : 0;  // of each warp's rows
constexpr int BARRIERS_OFFSET = SUMS_OFFSET + SUMS_FLOATS * 4;
static_assert(SMEM_BYTES == BARRIERS_OFFSET + 2 * NUM_STAGES * 8,
              "the plan and the kernel disagree on shared memory");

struct Buffers {
  Stage stages;
  SmemPtr<MaskElement> mask;  // of each warp; its part of the gradient leaves through it
  SmemPtr<float> sums;
};

struct Barriers {
  SmemPtr<uint64_t> full, empty;  // one a stage
};

enum NamedBarrier {
  SUMS_BARRIER = 1,  // all consumers
};

FC_DEVICE Barriers barriers() {
  const auto first = smem_view<uint64_t>(BARRIERS_OFFSET, 2 * NUM_STAGES, "barriers");
  return {first, first + NUM_STAGES};
}

// By one thread.
FC_DEVICE void init_barriers(const Barriers& bar) {
  for (int stage = 0; stage < NUM_STAGES; ++stage) {
    mbar_init(bar.full + stage, 1);
    mbar_init(bar.empty + stage, NUM_CONSUMERS * 4);
  }
  mbar_init_fence();
}

// --- pieces and steps ----------------------------------------------------------------------------

FC_DEVICE int num_key_tiles(const AttnParams& p) { return (p.seqlen_k + BLOCK_N - 1) / BLOCK_N; }

// The tiles of queries of a batch and head of the mask; the scores' rows are summed in one.
FC_DEVICE int num_row_tiles(const AttnParams& p) { return SUMS_ROWS ? 1 : p.num_m_blocks; }

FC_DEVICE int num_pieces(const AttnBwdSm90Params& params) {
  const MaskGradient& g = params.mask_gradient;
  return g.batch * g.heads * num_row_tiles(params.attn) * num_key_tiles(params.attn) *
         g.num_shares;
}

// A block's unit of work: a tile of the mask, and the steps [begin, end) of its walk.
struct Piece {
  BlockCoord first;  // of the mask where the tile is; where it is summed, 0
  int n_block;
  int share;
  int begin, end;
};

// Key tiles vary fastest, so that blocks running side by side share Q and dO in L2.
FC_DEVICE Piece piece_of(const AttnBwdSm90Params& params, int number) {
  const AttnParams& p = params.attn;
  const MaskGradient& g = params.mask_gradient;
  const int tile = number / g.num_shares;
  const int row_tile = tile / num_key_tiles(p);
  const int head = row_tile / num_row_tiles(p);
  Piece piece;
  piece.n_block = tile % num_key_tiles(p);
  piece.first.m_begin = row_tile % num_row_tiles(p) * BLOCK_M;
  piece.first.head_idx = head % g.heads;
  piece.first.batch_idx = head / g.heads;
  piece.share = number % g.num_shares;
  const int num_steps = p.batch / g.batch * (p.num_heads_q / g.heads) *
                        (SUMS_ROWS ? p.num_m_blocks : 1);
  piece.begin = int(int64_t(num_steps) * piece.share / g.num_shares);
  piece.end = int(int64_t(num_steps) * (piece.share + 1) / g.num_shares);
  return piece;
}

// The steps of a piece in their order: tiles of queries where they are summed, then heads, then
// batches.
struct Walk {
  BlockCoord block;
  int first_head, end_head, left;

  FC_DEVICE Walk(const AttnBwdSm90Params& params, const Piece& piece) {
    const AttnParams& p = params.attn;
    const int num_heads = p.num_heads_q / params.mask_gradient.heads;
    const int num_tiles = SUMS_ROWS ? p.num_m_blocks : 1;
    const int head = piece.begin / num_tiles;
    first_head = piece.first.head_idx;
    end_head = first_head + num_heads;
    left = piece.end - piece.begin;
    block = piece.first;
    if (SUMS_ROWS) block.m_begin = piece.begin % num_tiles * BLOCK_M;
    block.head_idx += head % num_heads;
    block.batch_idx += head / num_heads;
  }

  FC_DEVICE bool done() const { return left == 0; }

  FC_DEVICE void advance(const AttnParams& p) {
    --left;
    if (SUMS_ROWS) {
      block.m_begin += BLOCK_M;
      if (block.m_begin < p.seqlen_q) return;
      block.m_begin = 0;
    }
    if (++block.head_idx < end_head) return;
    block.head_idx = first_head;
    ++block.batch_idx;
  }
};

// Returns whether a query of the tile sees a key of tile n_block by position; all lanes agree.
FC_DEVICE bool is_seen(const AttnParams& p, int m_begin, int n_block) {
  if (!IS_BOUNDED) return true;
  const Range keys = key_tiles(p, m_begin);
  return n_block >= keys.begin && n_block < keys.end;
}

// --- loads ---------------------------------------------------------------------------------------

// One thread: has TMA load the chunks of the products of a step.
template <int CHUNKS>
FC_DEVICE void load_chunks(const TensorMap& a_map, const TensorMap& b_map, const Barriers& bar,
                           const Buffers& smem, uint32_t& count, const BlockCoord& block,
                           int key_begin, int head_idx_kv) {
  for (int chunk = 0; chunk < CHUNKS; ++chunk, ++count) {
    const int stage = stage_of<NUM_STAGES>(count);
    const auto full = bar.full + stage;
    const Stage rows = smem.stages[stage];
    mbar_wait(bar.empty + stage, parity_of<NUM_STAGES>(count) ^ 1);
    mbar_arrive_expect_tx(full, Stage::BYTES);
    tma_load(rows.smem, a_map, full, chunk * CHUNK, block.m_begin, block.head_idx,
             block.batch_idx);
    tma_load(rows.rows_from(BLOCK_M).smem, b_map, full, chunk * CHUNK, key_begin, head_idx_kv,
             block.batch_idx);
  }
}

// One thread: walks over the block's pieces, as far ahead as the stages allow.
FC_DEVICE void produce(const AttnBwdSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  const int heads_per_kv = p.num_heads_q / p.num_heads_kv;
  uint32_t count = 0;
  for (int number = block_idx(); number < num_pieces(params); number += num_blocks()) {
    const Piece piece = piece_of(params, number);
    const int key_begin = piece.n_block * BLOCK_N;
    for (Walk walk(params, piece); !walk.done(); walk.advance(p)) {
      const BlockCoord& block = walk.block;
      if (!is_seen(p, block.m_begin, piece.n_block)) continue;
      const int head_idx_kv = block.head_idx / heads_per_kv;
      load_chunks<QK_CHUNKS>(params.q_map, params.k_map, bar, smem, count, block, key_begin,
                             head_idx_kv);
      load_chunks<V_CHUNKS>(params.dout_map, params.v_map, bar, smem, count, block, key_begin,
                            head_idx_kv);
    }
  }
  grid_launch_dependents();
}

// lse and delta of a lane's two rows. A row that does not exist or sees no key has lse +inf: its
// probabilities are 0.
FC_DEVICE RowStats load_stats(const AttnBwdSm90Params& params, const BlockCoord& block,
                              int warp_row) {
  const AttnParams& p = params.attn;
  const GmemPtr<const float> lse_gmem = {p.tensors.lse.address};
  const GmemPtr<const float> delta_gmem = {params.delta.address};
  const int first = warp_row + accum_row(opaque(lane_idx()), 0);
  RowStats stats;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + r * 8;
    stats.lse_log2[r] = POS_INF;
    stats.delta[r] = 0.0f;
    if (row >= p.seqlen_q) continue;
    const int64_t at = lse_offset(p, block, row);
    const float lse_log2 = gmem_load(lse_gmem + at) * LOG2_E;
    if (lse_log2 != NEG_INF) stats.lse_log2[r] = lse_log2;
    stats.delta[r] = gmem_load(delta_gmem + at);
  }
  return stats;
}

// --- stores --------------------------------------------------------------------------------------

// Where a row of a piece begins, in elements of the gradient, or of all shares side by side.
FC_DEVICE int64_t row_offset(const AttnBwdSm90Params& params, const Piece& piece, int row) {
  const MaskGradient& g = params.mask_gradient;
  const int64_t rows = SUMS_ROWS ? 1 : params.attn.seqlen_q;
  const int64_t head = (int64_t(piece.share) * g.batch + piece.first.batch_idx) * g.heads +
                       piece.first.head_idx;
  return (head * rows + row) * g.row_stride;
}

// Two neighbours of a row on their way to memory, rounded to a mask's element.
FC_DEVICE Packet<2 * MASK_ELEMENT_BYTES> rounded_pair(float first, float second) {
  return mask_pair(from_float<MaskElement>(first), from_float<MaskElement>(second));
}

// Writes a warp's 16 rows of the gradient, through the place of its mask: by packets along the
// rows, or by elements where rows begin anywhere.
FC_DEVICE void store_tile(const WmmaAccum (&sums)[KEY_FRAGS], const AttnBwdSm90Params& params,
                          SmemPtr<MaskElement> own, const Piece& piece, int warp) {
  const AttnParams& p = params.attn;
  const int lane = opaque(lane_idx());  // or addresses computed once for all tiles live on
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int place = accum_row(lane, i) * MASK_STRIDE + n * 16 + accum_col(lane, i);
      smem_store_packet(own + place, rounded_pair(sums[n].x[i], sums[n].x[i + 1]));
    }
  }
  warp_sync();  // orders the writes above before the reads below
  constexpr int PACKET = OUT_BYTES / MASK_ELEMENT_BYTES;
  constexpr int PACKETS_PER_ROW = BLOCK_N / PACKET;
  const int warp_row = piece.first.m_begin + warp * 16;
  const int key_begin = piece.n_block * BLOCK_N;
  for (int packet = lane; packet < 16 * PACKETS_PER_ROW; packet += 32) {
    const int row = packet / PACKETS_PER_ROW;
    const int col = packet % PACKETS_PER_ROW * PACKET;
    if (warp_row + row >= p.seqlen_q || key_begin + col >= p.seqlen_k) continue;
    const auto to = params.dmask + (row_offset(params, piece, warp_row + row) + key_begin + col);
    gmem_store_packet(to, smem_load_packet<OUT_BYTES>(own + (row * MASK_STRIDE + col)));
  }
  warp_sync();  // orders the reads before the next tile's mask
}

// Writes a warp's 16 rows of a share, whose rows begin at multiples of 16 bytes and are padded.
FC_DEVICE void store_share(const WmmaAccum (&sums)[KEY_FRAGS], const AttnBwdSm90Params& params,
                           const Piece& piece, int warp) {
  const int lane = opaque(lane_idx());
  const int key_begin = piece.n_block * BLOCK_N + accum_col(lane, 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = piece.first.m_begin + warp * 16 + accum_row(lane, r * 2);
    if (row >= params.attn.seqlen_q) continue;
    const auto to = params.dmask_shares + row_offset(params, piece, row);
#pragma unroll
    for (int n = 0; n < KEY_FRAGS; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = key_begin + n * 16 + half * 8;
        const float* x = sums[n].x + (half * 4 + r * 2);
        if (key >= params.mask_gradient.row_stride) continue;
        gmem_store_packet(to + key, Packet<8>{{to_packet(x[0]).word[0], to_packet(x[1]).word[0]}});
      }
    }
  }
}

// Adds up the rows of all consumers, always in the same order, and writes the one row of a tile's
// gradient, or of a share of it.
FC_DEVICE void store_column_sums(const WmmaAccum (&sums)[KEY_FRAGS],
                                 const AttnBwdSm90Params& params, const Buffers& smem,
                                 const Piece& piece, int warp) {
  const int lane = opaque(lane_idx());
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (row_of_element(i) != 0) continue;
      float sum = sums[n].x[i] + sums[n].x[i + 2];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum += shfl_xor(sum, mask);
      if (lane < 4) smem_store(smem.sums + (warp * BLOCK_N + n * 16 + accum_col(lane, i)), sum);
    }
  }
  named_barrier_sync(SUMS_BARRIER, NUM_CONSUMERS * 128);  // orders the writes before the reads
  for (int col = thread_idx() - 128; col < BLOCK_N; col += NUM_CONSUMERS * 128) {
    float sum = 0.0f;
    for (int other = 0; other < NUM_CONSUMERS * 4; ++other) {
      sum += smem_load(smem.sums + (other * BLOCK_N + col));
    }
    const int key = piece.n_block * BLOCK_N + col;
    if (key >= params.mask_gradient.row_stride) continue;
    const int64_t at = row_offset(params, piece, 0) + key;
    if constexpr (IN_SHARES) {
      gmem_store(params.dmask_shares + at, sum);
    } else {
      gmem_store(params.dmask + at, from_float<MaskElement>(sum));
    }
  }
  named_barrier_sync(SUMS_BARRIER, NUM_CONSUMERS * 128);  // orders them before the next tile's
}
