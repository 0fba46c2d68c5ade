// A ring of two stages between a warp that writes and three warps that read, over several phases.
#pragma once

#include "prims_sm90.cuh"

struct MbarriersParams {
  GmemPtr<int32_t> seen;  // [ROUNDS, 3, 32]
};

constexpr int ROUNDS = 9;

FC_KERNEL(mbarriers, 128, 1)(const MbarriersParams p) {
  const auto ring = smem_view<int32_t>(0, 2 * 32, "ring");
  const auto full = smem_view<uint64_t>(256, 2, "full");
  const auto empty = smem_view<uint64_t>(272, 2, "empty");
  if (thread_idx() == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbar_init(full + stage, 32);
      mbar_init(empty + stage, 96);
    }
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  for (int round = 0; round < ROUNDS; ++round) {
    const int stage = round % 2;
    const int parity = round / 2 % 2;
    if (warp_idx() == 0) {
      mbar_wait(empty + stage, parity ^ 1);
      smem_store(ring + (stage * 32 + lane_idx()), round * 100 + lane_idx());
      mbar_arrive(full + stage);
    } else {
      // One warp asks before it waits; in the last one lane waits for all of them.
      const bool is_there = warp_idx() == 1 && mbar_test(full + stage, parity);
      if (!is_there && (warp_idx() != 3 || lane_idx() == 7)) mbar_wait(full + stage, parity);
      if (warp_idx() == 3) warp_sync();
      const int32_t value = smem_load(ring + (stage * 32 + (lane_idx() ^ warp_idx())));
      mbar_arrive(empty + stage);
      gmem_store(p.seen + ((round * 3 + warp_idx() - 1) * 32 + lane_idx()), value);
    }
  }
}
