// warp_sync orders what lanes of one warp write, block_sync what all threads write, round after
// round.
#pragma once

#include "prims.cuh"

struct BarriersParams {
  GmemPtr<float> rotated;   // [128]: thread i after ROUNDS rotations by one within its warp
  GmemPtr<float> mirrored;  // [128]: thread i after one more exchange over the whole block
};

constexpr int ROUNDS = 5;

FC_KERNEL(barriers, 128, 1)(const BarriersParams p) {
  const auto place = smem_view<float>(0, 128, "place");
  float x = float(thread_idx());
  for (int round = 0; round < ROUNDS; ++round) {
    smem_store(place + thread_idx(), x);
    warp_sync();  // orders the store above before the neighbour's load
    x = smem_load(place + (warp_idx() * 32 + (lane_idx() + 1) % 32));
    warp_sync();  // orders the load before the next round's store
  }
  gmem_store(p.rotated + thread_idx(), x);
  smem_store(place + thread_idx(), x);
  block_sync();  // orders every store before the mirrored loads
  gmem_store(p.mirrored + thread_idx(), smem_load(place + (127 - thread_idx())));
}
