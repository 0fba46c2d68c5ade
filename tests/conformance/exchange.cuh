// shfl_xor, warp_any and warp_uniform of every warp of a block, and who each thread thinks it is.
#pragma once

#include "prims.cuh"

struct ExchangeParams {
  GmemPtr<const float> values;  // [blocks, 64]
  GmemPtr<float> shuffled;      // [blocks, 32 masks, 64]
  GmemPtr<int32_t> integers;    // [blocks, 32 masks, 64]: of numbers that no float holds
  GmemPtr<int32_t> votes;       // [blocks, 33, 64]: predicate lane == n; n == 32: nobody
  GmemPtr<int32_t> uniform;     // [blocks, 64]: 100 * block + warp
  GmemPtr<int32_t> identity;    // [blocks, 64, 4]: block, thread, warp, lane
};

FC_KERNEL(exchange, 64, 1)(const ExchangeParams p) {
  const int me = block_idx() * 64 + thread_idx();
  const float x = gmem_load(p.values + me);
  for (int mask = 0; mask < 32; ++mask) {
    gmem_store(p.shuffled + ((block_idx() * 32 + mask) * 64 + thread_idx()), shfl_xor(x, mask));
    gmem_store(p.integers + ((block_idx() * 32 + mask) * 64 + thread_idx()),
               shfl_xor((1 << 30) + me, mask));
  }
  for (int n = 0; n <= 32; ++n) {
    // Only warp 1 votes for: a vote stays within its warp.
    const bool any = warp_any(warp_idx() == 1 && lane_idx() == n);
    gmem_store(p.votes + ((block_idx() * 33 + n) * 64 + thread_idx()), any ? 1 : 0);
  }
  gmem_store(p.uniform + me, warp_uniform(100 * block_idx() + thread_idx() / 32));
  gmem_store(p.identity + me * 4, block_idx());
  gmem_store(p.identity + (me * 4 + 1), thread_idx());
  gmem_store(p.identity + (me * 4 + 2), warp_idx());
  gmem_store(p.identity + (me * 4 + 3), lane_idx());
}
