// Blocks add floats to the same sums one after the other, in the order of the numbers that they
// draw: the first one stores, each other waits at a counter. With a FAULT for the simulator alone.
#pragma once

#include "prims_sm90.cuh"

struct TurnsParams {
  GmemPtr<const float> addends;  // [blocks, 256]
  GmemPtr<float> sums;           // [256]
  GmemPtr<int32_t> counters;     // [2]: numbers drawn, blocks that have added
};

enum Fault { NONE, NOT_AWAITED, NO_FENCE, TOLD_EARLY, TOLD_RELAXED, WRONG_TURN };

FC_KERNEL(turns, 32, 1)(FC_PARAM(TurnsParams) p) {
  const auto own = smem_view<float>(0, 256, "own");
  const bool leads = elect_lane();
  int rank = 0;
  if (leads) rank = gmem_atomic_add(p.counters, 1);
  for (int i = 1; i < 32; i *= 2) rank += shfl_xor(rank, i);
  for (int i = lane_idx(); i < 256; i += 32) {
    smem_store(own + i, gmem_load(p.addends + (rank * 256 + i)));
  }
  fence_proxy_async();
  warp_sync();  // orders the writes above before they are read
  if (!leads) return;
  if (FAULT != NOT_AWAITED) gmem_await(p.counters + 1, FAULT == WRONG_TURN ? rank + 1 : rank);
  if (FAULT != NO_FENCE) fence_proxy_async_global();
  if (rank == 0) {
    bulk_store(p.sums, own, 1024);
  } else {
    bulk_add(p.sums, own, 1024);
  }
  tma_store_commit();
  tma_store_wait_read<0>();
  if (FAULT != TOLD_EARLY) tma_store_wait<0>();
  if (FAULT == TOLD_RELAXED) {
    gmem_atomic_add(p.counters + 1, 1);
  } else {
    gmem_release_add(p.counters + 1, 1);
  }
  if (FAULT == TOLD_EARLY) tma_store_wait<0>();
}
