// tile/schedule.cuh - which query rows a block computes.
#pragma once

#include "prims.cuh"
#include "tile/params.cuh"

struct BlockCoord {
  int batch_idx;
  int head_idx;     // of q
  int head_idx_kv;  // of k and v: num_heads_q / num_heads_kv query heads share one
  int m_begin;      // first query row
  int split = 0;    // the part of the row tile's keys, see tile/shares.cuh
  int tile_begin = 0, tile_end = 0;  // of the piece, counted from the row tile's first key tile
  bool is_last = false;  // of the block's pieces, where the host splits keys
  // Under STREAM_K alone, see tile/stream_k.cuh.
  int num_splits = 1;  // of the row tile
  int first_slot = 0;  // of the row tile's first share
};

// The order in which persistent blocks take tiles, see fwd_sm90/schedule_sm90.cuh.
struct TileSchedule {
  int32_t num_heads;          // num_heads_q * batch
  int32_t heads_per_section;  // of the last section maybe more; read only under a right bound
};

// A batch and one of `num_heads` heads, in the order in which blocks take them. Heads vary faster;
// but where all batches have the same mask, of each head, batches do: L2 then has it for all.
struct BatchAndHead {
  int batch, head;
};

FC_DEVICE BatchAndHead batch_and_head(const AttnParams& p, int number, int num_heads) {
  const bool batches_vary_faster =
      MASK_KIND != 0 && p.strides.mask.batch == 0 && p.strides.mask.head != 0;
  const int faster = batches_vary_faster ? p.batch : num_heads;
  const int rest = number % faster;
  const int quotient = number / faster;
  if (batches_vary_faster) return {rest, quotient};
  return {quotient, rest};
}

// The heads of a block; m_begin is left open.
FC_DEVICE BlockCoord head_coord(const AttnParams& p, int number) {
  const BatchAndHead at = batch_and_head(p, number, p.num_heads_q);
  BlockCoord coord;
  coord.head_idx = at.head;
  coord.batch_idx = at.batch;
  coord.head_idx_kv = coord.head_idx / (p.num_heads_q / p.num_heads_kv);
  return coord;
}

// Row tiles vary fastest, so that blocks running side by side share K and V in L2. Under a right
// bound (causal) later rows see more keys: the longest tiles start first.
FC_DEVICE BlockCoord block_coord(const AttnParams& p, int tile) {
  const int m_block = tile % p.num_m_blocks;
  BlockCoord coord = head_coord(p, tile / p.num_m_blocks);
  coord.m_begin = (HAS_WINDOW_RIGHT ? p.num_m_blocks - 1 - m_block : m_block) * BLOCK_M;
  return coord;
}

// The sum over the lanes below, and over all lanes.
struct WarpScan {
  int below, total;
};

FC_DEVICE WarpScan warp_scan(int x) {
  WarpScan scan = {0, x};
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    const int other = shfl_xor(scan.total, bit);
    if (lane_idx() & bit) scan.below += other;
    scan.total += other;
  }
  return scan;
}
