// fwd_sm90/pipeline_sm90.cuh - the mbarriers between the producer and the consumers, the place of
// each in the ring of stages, and the barriers among consumers.
#pragma once

#include "prims_sm90.cuh"

constexpr int NUM_ROW_GROUPS = BLOCK_M / 64;  // a group of rows: the 64 of a warpgroup
constexpr int NUM_CONSUMERS = NUM_ROW_GROUPS * KEY_SLICES;  // warpgroups
static_assert(KEY_SLICES == 1 || NUM_ROW_GROUPS == 1, "one group of rows shares the keys");
constexpr int NUM_Q_SLOTS = Q_BUFFERS * NUM_ROW_GROUPS;
constexpr int NUM_BARRIERS = 2 * NUM_Q_SLOTS + 4 * NUM_STAGES + (KEY_SLICES > 1 ? 2 : 0);

// A `full` barrier completes when the bytes announced by the producer have arrived; an `empty` one
// when all consumers have read the buffer.
struct Barriers {
  SmemPtr<uint64_t> q_full, q_empty;                   // one a slot, see q_slot
  SmemPtr<uint64_t> k_full, k_empty, v_full, v_empty;  // one a stage
  SmemPtr<uint64_t> merge_full, merge_empty;           // with KEY_SLICES, see merge_sm90.cuh
};

FC_DEVICE Barriers barriers(int byte_offset) {
  const auto first = smem_view<uint64_t>(byte_offset, NUM_BARRIERS, "barriers");
  const auto ring = first + 2 * NUM_Q_SLOTS;
  return {first,
          first + NUM_Q_SLOTS,
          ring,
          ring + NUM_STAGES,
          ring + 2 * NUM_STAGES,
          ring + 3 * NUM_STAGES,
          ring + 4 * NUM_STAGES,
          ring + (4 * NUM_STAGES + 1)};
}

// Must be called by one thread. The counts say how many threads arrive at an `empty` barrier.
FC_DEVICE void init_barriers(const Barriers& bar, int kv_empty_count, int q_empty_count) {
  for (int slot = 0; slot < NUM_Q_SLOTS; ++slot) {
    mbar_init(bar.q_full + slot, 1);
    mbar_init(bar.q_empty + slot, q_empty_count);
  }
  for (int stage = 0; stage < NUM_STAGES; ++stage) {
    mbar_init(bar.k_full + stage, 1);
    mbar_init(bar.v_full + stage, 1);
    mbar_init(bar.k_empty + stage, kv_empty_count);
    mbar_init(bar.v_empty + stage, kv_empty_count);
  }
  if (KEY_SLICES > 1) {
    mbar_init(bar.merge_full, (KEY_SLICES - 1) * 128);
    mbar_init(bar.merge_empty, 128);
  }
  mbar_init_fence();
}

// Which 64 rows of the Q buffers belong to a group of rows of a block's row tile number `turn`; and
// the parity of their phase.
FC_DEVICE int q_slot(int turn, int group) { return turn % Q_BUFFERS * NUM_ROW_GROUPS + group; }
FC_DEVICE int q_parity(int turn) { return turn / Q_BUFFERS % 2; }

// Consumers that share the keys of some rows have a ring of stages each.
constexpr uint32_t STAGES_PER_RING = NUM_STAGES / KEY_SLICES;
static_assert(NUM_STAGES % KEY_SLICES == 0, "the rings are of one size");
static_assert(STAGES_PER_RING >= 2, "a consumer holds one V while it waits for the next");

// How many tiles went through a ring of stages; where the next one goes, and the parity of the
// phase in which its `full` barrier completes. Who waits for `empty` waits for the other parity: a
// fresh barrier counts as completed in phase -1.
struct PipelineState {
  int ring = 0;
  uint32_t count = 0;  // unsigned, for short remainders: the next product waits for them

  FC_DEVICE int stage() const {
    return (KEY_SLICES > 1 ? ring * int(STAGES_PER_RING) : 0) + int(count % STAGES_PER_RING);
  }
  FC_DEVICE int parity() const { return int(count / STAGES_PER_RING % 2); }
};

// A consumer warp is done with the stage.
FC_DEVICE void release(SmemPtr<uint64_t> empty, PipelineState state) {
  if (lane_idx() == 0) mbar_arrive(empty + state.stage());
}

enum NamedBarrier {
  ISSUE_BARRIER = 1,                              // + consumer: it may issue products
  STORE_BARRIER = ISSUE_BARRIER + NUM_CONSUMERS,  // + consumer: the warps of a warpgroup
};
