// ptx/thread.cuh - who am I, and exchange between the lanes of a warp.
#pragma once

FC_DEVICE int thread_idx() { return int(threadIdx.x); }
FC_DEVICE int block_idx() { return int(blockIdx.x); }
FC_DEVICE int num_blocks() { return int(gridDim.x); }
FC_DEVICE int lane_idx() { return int(threadIdx.x) % 32; }
FC_DEVICE int warp_idx() { return int(threadIdx.x) / 32; }

// Value of lane `lane_idx() ^ lane_mask`. All 32 lanes must arrive. Orders no memory.
FC_DEVICE float shfl_xor(float x, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}

FC_DEVICE int shfl_xor(int x, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}

// x, which all lanes have alike, where the compiler cannot know that: goes to a uniform register.
// All 32 lanes must arrive.
FC_DEVICE int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// True on all lanes when any lane's predicate is. All 32 lanes must arrive. Orders no memory.
FC_DEVICE bool warp_any(bool predicate) { return __any_sync(0xffffffffu, predicate) != 0; }
