// bwd_sm90/bwd_dq_sm90.cuh - the kernel of dQ: where in shared memory what lies, and who loads it.
// Mirrored by kernels/bwd_sm90/plan.py.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_varlen.cuh"
#include "tile/sequence.cuh"
#include "tile/smem_tile.cuh"
#include "fwd_sm90/mask_tile_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"

constexpr int NUM_CONSUMERS = BLOCK_M / 64;  // warpgroups of 64 query rows
constexpr int KEY_FRAGS = BLOCK_N / 16;

using KTile = SmemTile<BLOCK_N, HEAD_DIM>;
using VTile = SmemTile<BLOCK_N, HEAD_DIM_V>;

constexpr int NUM_SLOTS = Q_BUFFERS * NUM_CONSUMERS;  // of 64 rows of Q and dO
constexpr int DO_OFFSET = NUM_SLOTS * QkGroup::BYTES;
constexpr int K_OFFSET = DO_OFFSET + NUM_SLOTS * VGroup::BYTES;
constexpr int V_OFFSET = K_OFFSET + NUM_STAGES * KTile::BYTES;
constexpr int OUT_OFFSET = V_OFFSET + NUM_V_STAGES * VTile::BYTES;
// Without a buffer of its own dQ leaves through the place of Q.
constexpr int NUM_OUT_GROUPS = HAS_OUT_BUFFER ? NUM_CONSUMERS : 0;
constexpr int MASK_OFFSET = OUT_OFFSET + NUM_OUT_GROUPS * QkGroup::BYTES;
constexpr int MASK_ELEMENTS = MASK_KIND == 0 ? 0 : NUM_CONSUMERS * 4 * MASK_WARP_ELEMENTS;
constexpr int BARRIERS_OFFSET = MASK_OFFSET + MASK_ELEMENTS * MASK_ELEMENT_BYTES;
constexpr int NUM_BARRIERS = 2 * NUM_SLOTS + 2 * NUM_STAGES + 2 * NUM_V_STAGES;
constexpr int COORDS_OFFSET = BARRIERS_OFFSET + NUM_BARRIERS * 8;
constexpr int FEED_OFFSET = COORDS_OFFSET + COORD_SLOTS * COORD_INTS * 4;
static_assert(SMEM_BYTES == FEED_OFFSET + FEED_BYTES,
              "the plan and the kernel disagree on shared memory");

struct Buffers {
  QkGroup q;  // one a slot
  VGroup dout;
  KTile k;  // one a stage
  VTile v;
  QkGroup out;  // one a consumer
  SmemPtr<MaskElement> mask;  // of each warp
  SmemPtr<int32_t> coords;  // of the row tiles at hand; they come with Q
  Feed feed;                // from which the producer has them, where they are dealt out
};

struct Barriers {
  SmemPtr<uint64_t> q_full, q_empty;  // one a slot; of Q and dO
  SmemPtr<uint64_t> k_full, k_empty, v_full, v_empty;
};

enum NamedBarrier {
  STORE_BARRIER = 1,  // + consumer: the warps of a warpgroup
};

FC_DEVICE Barriers barriers() {
  const auto first = smem_view<uint64_t>(BARRIERS_OFFSET, NUM_BARRIERS, "barriers");
  const auto ring = first + 2 * NUM_SLOTS;
  return {first,
          first + NUM_SLOTS,
          ring,
          ring + NUM_STAGES,
          ring + 2 * NUM_STAGES,
          ring + (2 * NUM_STAGES + NUM_V_STAGES)};
}

// By one thread.
FC_DEVICE void init_barriers(const Barriers& bar) {
  for (int slot = 0; slot < NUM_SLOTS; ++slot) {
    mbar_init(bar.q_full + slot, 1);
    mbar_init(bar.q_empty + slot, 4);
  }
  for (int stage = 0; stage < NUM_STAGES; ++stage) {
    mbar_init(bar.k_full + stage, 1);
    mbar_init(bar.k_empty + stage, NUM_CONSUMERS * 4);
  }
  for (int stage = 0; stage < NUM_V_STAGES; ++stage) {
    mbar_init(bar.v_full + stage, 1);
    mbar_init(bar.v_empty + stage, NUM_CONSUMERS * 4);
  }
  mbar_init_fence();
}

// The slot of a consumer in a block's row tile number `turn`, and the parity of its phase.
FC_DEVICE int slot_of(int turn, int group) { return turn % Q_BUFFERS * NUM_CONSUMERS + group; }
FC_DEVICE int slot_parity(int turn) { return turn / Q_BUFFERS % 2; }

// One thread: walks over the block's row tiles, and has TMA load Q and dO, and K and V as far ahead
// as the stages allow, keys from last to first.
FC_DEVICE void produce(const AttnBwdSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  uint32_t count = 0;
  auto tile = own_tiles<false>(p, smem.feed);
  for (int turn = 0;; ++turn, tile.advance(p, params.schedule)) {
    const auto coord = coord_slot(smem.coords, turn);
    if (tile.done(p, params.schedule)) {
      smem_store(coord, NO_TILE);
      for (int group = 0; group < NUM_CONSUMERS; ++group) {
        mbar_wait(bar.q_empty + slot_of(turn, group), slot_parity(turn) ^ 1);
        mbar_arrive(bar.q_full + slot_of(turn, group));
      }
      grid_launch_dependents();
      return;
    }
    const BlockCoord block = tile.coord(p, params.schedule);
    store_coord(coord, block);
    const auto& own = sequence_params(p, block);
    const BoxOrigin q_box = query_box(p, block);
    const BoxOrigin k_box = key_box(p, block, p.lengths.k_rows_per_batch);
    const BoxOrigin v_box = key_box(p, block, p.lengths.v_rows_per_batch);
    for (int group = 0; group < NUM_CONSUMERS; ++group) {
      const int slot = slot_of(turn, group);
      const auto full = bar.q_full + slot;
      int row = block.m_begin + group * 64;
      if (PACKED) row = min_i(row, own.seqlen_q - 1);  // see make_ragged: no box without a row
      mbar_wait(bar.q_empty + slot, slot_parity(turn) ^ 1);
      mbar_arrive_expect_tx(full, QkGroup::BYTES + VGroup::BYTES);
      smem.q.load(slot, params.q_map, full, q_box.row + row, block.head_idx, q_box.batch);
      smem.dout.load(slot, params.dout_map, full, q_box.row + row, block.head_idx, q_box.batch);
    }
//@if gate delta
    const Range keys = {0, 0};
//@else
    const Range keys = key_tiles(own, block.m_begin);
//@end
    bool asked = false;
    for (int n_block = keys.end - 1; n_block >= keys.begin; --n_block, ++count) {
      if (!asked && n_block < keys.begin + ASK_AHEAD) {
        tile.ask(p, params.schedule);
        asked = true;
      }
      const int k_stage = stage_of<NUM_STAGES>(count);
      const auto k_full = bar.k_full + k_stage;
      mbar_wait(bar.k_empty + k_stage, parity_of<NUM_STAGES>(count) ^ 1);
      mbar_arrive_expect_tx(k_full, KTile::BYTES);
      smem.k.load(k_stage, params.k_map, k_full, k_box.row + n_block * BLOCK_N, block.head_idx_kv,
                           k_box.batch);
      const int v_stage = stage_of<NUM_V_STAGES>(count);
      const auto v_full = bar.v_full + v_stage;
      mbar_wait(bar.v_empty + v_stage, parity_of<NUM_V_STAGES>(count) ^ 1);
      mbar_arrive_expect_tx(v_full, VTile::BYTES);
      smem.v.load(v_stage, params.v_map, v_full, v_box.row + n_block * BLOCK_N, block.head_idx_kv,
                           v_box.batch);
    }
    if (!asked) tile.ask(p, params.schedule);  // it has no key tiles
  }
}
