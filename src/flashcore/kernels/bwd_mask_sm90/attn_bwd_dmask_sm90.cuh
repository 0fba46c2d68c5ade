// attn_bwd_dmask_sm90.cuh - gradient of an additive mask for Hopper, summed over the batches, heads
// and queries that share an element of it; bwd_sm90/bwd_sm90.cuh has the equations. A block owns a
// tile of the mask, BLOCK_M queries (all of them, where they share one row) and BLOCK_N keys, and
// walks over the scores that the tile is added to:
//
//   S = Q K^T    dP = dO V^T    dMask += P (dP - delta)
//
// The sum stays in float32 registers, so every element is written once and the same in each run.
// Where a mask has too few tiles to fill the GPU, a tile's walk is divided among blocks, each of
// which writes a share in float32, and torch adds these up.
//
// It follows the kernel of dQ, which computes delta. A thread of the producer warpgroup loads both
// operands of the products by TMA, a chunk of columns at a time, whatever HEAD_DIM is.
#pragma once

#include "prims_sm90.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/mask_tile_sm90.cuh"
#include "bwd_sm90/bwd_delta_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"
#include "bwd_mask_sm90/bwd_dmask_sm90.cuh"

// A consumer warpgroup's state, carried from step to step; it owns 64 queries of the tile.
struct Consumer {
  int index;
  WmmaAccum scores[KEY_FRAGS];  // then P
  WmmaAccum dprobs[KEY_FRAGS];
  WmmaAccum sums[KEY_FRAGS];
  uint32_t count;  // of all chunks that came through the stages
};

FC_DEVICE void release(const Barriers& bar, uint32_t count) {
  arrive_for_warp(bar.empty + stage_of<NUM_STAGES>(count));
}

// out = A B^T of DIM columns, issued chunk by chunk. The stage of a chunk is released behind the
// products of the next; so is the last one of the product before, if there is one.
template <int DIM, bool IS_SECOND>
FC_DEVICE void issue_product(WmmaAccum (&out)[KEY_FRAGS], Consumer& c, const Barriers& bar,
                             const Buffers& smem) {
  constexpr int CHUNKS = (DIM + CHUNK - 1) / CHUNK;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    mbar_wait(bar.full + stage_of<NUM_STAGES>(c.count), parity_of<NUM_STAGES>(c.count));
    // Uniform, or each descriptor is moved from general to uniform registers.
    const int stage = warp_uniform(stage_of<NUM_STAGES>(c.count));
    const auto a = smem.stages.rows_from(c.index * 64).over_columns() + stage * Stage::BYTES;
    const auto b = smem.stages.rows_from(BLOCK_M).over_columns() + stage * Stage::BYTES;
    wgmma_fence();
#pragma unroll
    for (int col = 0; col < CHUNK; col += 16) {
      if (chunk * CHUNK + col >= DIM) continue;
      const int bytes = Stage::column_bytes(col);
      wgmma_ss<Element>(out, a + bytes, b + bytes, chunk > 0 || col > 0);
    }
    wgmma_commit();
    // The last chunks of all are waited for behind the exponentials.
    const bool is_last = IS_SECOND && chunk > 0 && chunk == CHUNKS - 1;
    if ((IS_SECOND || chunk > 0) && !is_last) {
      wgmma_wait<1>();
      release(bar, c.count - 1);
    }
    ++c.count;
  }
}

// S becomes P of 16 rows a warp.
FC_DEVICE void exponentiate(Consumer& c, const AttnParams& p, const MaskStrip& mask,
                            const RowStats& stats, int warp_row, int n_block) {
  scale_scores(c.scores, p);
  mask.add_fetched(c.scores, p, warp_row);
  warp_sync();  // orders the reads before the gradient, which leaves through the same place
  hide_scores(c.scores, p, warp_row, n_block * BLOCK_N);
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = c.scores[n].x[i];
      x = exp2_approx(fma_rn(x, LOG2_E, -stats.lse_log2[row_of_element(i)]));
    }
  }
}

// Adds P (dP - delta).
FC_DEVICE void add_gradient(Consumer& c, const RowStats& stats) {
  const bool is_empty[2] = {stats.lse_log2[0] == POS_INF, stats.lse_log2[1] == POS_INF};
  if (warp_any(is_empty[0] || is_empty[1])) {  // whatever arrived there, NaN too
#pragma unroll
    for (int n = 0; n < KEY_FRAGS; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (is_empty[row_of_element(i)]) c.dprobs[n].x[i] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float ds = c.dprobs[n].x[i] - stats.delta[row_of_element(i)];
      c.sums[n].x[i] = fma_rn(c.scores[n].x[i], ds, c.sums[n].x[i]);
    }
  }
}

// One step: the scores of a batch, head and tile of queries. ptxas serialises products that are
// under way from one turn of a loop to the next, so all are waited for here.
FC_DEVICE void add_step(Consumer& c, const AttnBwdSm90Params& params, const Barriers& bar,
                        const Buffers& smem, const MaskStrip& mask, const BlockCoord& block,
                        int n_block) {
  const int warp_row = block.m_begin + c.index * 64 + warp_idx() % 4 * 16;
  const RowStats stats = load_stats(params, block, warp_row);  // beside the products
  issue_product<HEAD_DIM, false>(c.scores, c, bar, smem);
  issue_product<HEAD_DIM_V, true>(c.dprobs, c, bar, smem);
  wgmma_hold(c.scores);
  exponentiate(c, params.attn, mask, stats, warp_row, n_block);
  wgmma_wait<0>();
  wgmma_hold(c.dprobs);
  if (V_CHUNKS > 1) release(bar, c.count - 2);
  release(bar, c.count - 1);
  add_gradient(c, stats);
}

// A consumer warpgroup: 64 queries of every tile of this block.
FC_DEVICE void consume(const AttnBwdSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  Consumer c;
  c.index = warp_uniform(warp_idx() / 4 - 1);
  c.count = 0;
  const int warp = c.index * 4 + warp_idx() % 4;
  const auto own = smem.mask + warp * MASK_WARP_ELEMENTS;
  for (int number = block_idx(); number < num_pieces(params); number += num_blocks()) {
    Piece piece = piece_of(params, number);
    const MaskStrip mask = {mask_of(p, piece.first.batch_idx, piece.first.head_idx), own,
                            piece.n_block};
    mask.fetch(p, piece.first.m_begin + warp * 16, piece.n_block);
    clear(c.sums);
    for (Walk walk(params, piece); !walk.done(); walk.advance(p)) {
      if (!is_seen(p, walk.block.m_begin, piece.n_block)) continue;
      add_step(c, params, bar, smem, mask, walk.block, piece.n_block);
    }
    cp_async_wait<0>();  // of a mask that no step has read
    warp_sync();         // orders all reads and copies of it before the writes below
    piece = piece_of(params, opaque(number));  // or its fields live through the walk
    if constexpr (SUMS_ROWS) {
      store_column_sums(c.sums, params, smem, piece, warp);
    } else if constexpr (IN_SHARES) {
      store_share(c.sums, params, piece, warp);
    } else {
      store_tile(c.sums, params, own, piece, warp);
    }
  }
}

FC_KERNEL(attn_bwd_dmask_sm90, NUM_WARPS * 32, MIN_BLOCKS)
(FC_PARAM(AttnBwdSm90Params) params) {
  const Buffers smem = {  // see attn_bwd_dkdv_sm90.cuh
      {smem_view<Element>(0, NUM_STAGES * Stage::ELEMENTS, "tiles_smem")},
      smem_view<MaskElement>(MASK_OFFSET, NUM_CONSUMERS * 4 * MASK_WARP_ELEMENTS, "mask_smem"),
      smem_view<float>(SUMS_OFFSET, SUMS_FLOATS, "sums_smem"),
  };
  const Barriers bar = barriers();
  if (thread_idx() == 0) {
    tma_prefetch_map(params.q_map);
    tma_prefetch_map(params.k_map);
    tma_prefetch_map(params.dout_map);
    tma_prefetch_map(params.v_map);
    init_barriers(bar);
  }
  block_sync();  // orders the initialisation before every use
  grid_dependency_wait();

  if (warp_idx() < 4) {
    lower_registers<PRODUCER_REGISTERS>();
    if (warp_idx() == 0 && elect_lane()) produce(params, bar, smem);
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    consume(params, bar, smem);
  }
}
