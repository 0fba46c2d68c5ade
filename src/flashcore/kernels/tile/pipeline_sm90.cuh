// tile/pipeline_sm90.cuh - the mbarriers between the producer and the consumers, and the place of
// each in the ring of stages.
#pragma once

constexpr int NUM_BARRIERS = 2 + 4 * NUM_STAGES;

// A `full` barrier completes when the bytes announced by the producer have arrived; an `empty` one
// when all consumers have read the buffer.
struct Barriers {
  SmemPtr<uint64_t> q_full, q_empty;
  SmemPtr<uint64_t> k_full, k_empty, v_full, v_empty;  // one a stage
};

FC_DEVICE Barriers barriers(int byte_offset) {
  const auto first = smem_view<uint64_t>(byte_offset, NUM_BARRIERS, "barriers");
  const auto ring = first + 2;
  return {first,
          first + 1,
          ring,
          ring + NUM_STAGES,
          ring + 2 * NUM_STAGES,
          ring + 3 * NUM_STAGES};
}

// By one thread. The counts say how many threads arrive at an `empty` barrier.
FC_DEVICE void init_barriers(const Barriers& bar, int kv_empty_count, int q_empty_count) {
  mbar_init(bar.q_full, 1);
  mbar_init(bar.q_empty, q_empty_count);
  for (int stage = 0; stage < NUM_STAGES; ++stage) {
    mbar_init(bar.k_full + stage, 1);
    mbar_init(bar.v_full + stage, 1);
    mbar_init(bar.k_empty + stage, kv_empty_count);
    mbar_init(bar.v_empty + stage, kv_empty_count);
  }
  mbar_init_fence();
}

// How many tiles went through a ring of stages; where the next one goes, and the parity of the
// phase in which its `full` barrier completes. Who waits for `empty` waits for the other parity: a
// fresh barrier counts as completed in phase -1.
struct PipelineState {
  int count = 0;

  FC_DEVICE int stage() const { return count % NUM_STAGES; }
  FC_DEVICE int parity() const { return count / NUM_STAGES % 2; }
};

// A consumer warp is done with the stage.
FC_DEVICE void release(SmemPtr<uint64_t> empty, PipelineState& state) {
  if (lane_idx() == 0) mbar_arrive(empty + state.stage());
  ++state.count;
}
