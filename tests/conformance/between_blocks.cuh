// gmem_atomic_add_acq_rel: blocks write shares, count, and whoever counts last reads all of them,
// every thread those of other threads; over and over, with the counter put back.
#pragma once

#include "prims.cuh"

struct BetweenBlocksParams {
  GmemPtr<int32_t> counter;  // [rounds]
  GmemPtr<int32_t> shares;   // [rounds, blocks, 64]
  GmemPtr<int32_t> sums;     // [rounds, 64]
  int32_t rounds;
};

FC_KERNEL(between_blocks, 64, 1)(const BetweenBlocksParams p) {
  const auto is_last = smem_view<int32_t>(0, 1, "is_last");
  const int me = thread_idx();
  for (int round = 0; round < p.rounds; ++round) {
    const auto shares = p.shares + round * num_blocks() * 64;
    gmem_store(shares + (block_idx() * 64 + me), block_idx() * 1000 + me + round);
    block_sync();  // orders all writes before the count
    if (me == 0) {
      const int before = gmem_atomic_add_acq_rel(p.counter + round, 1);
      if (before == num_blocks() - 1) gmem_atomic_add(p.counter + round, -num_blocks());
      smem_store(is_last, before == num_blocks() - 1 ? 1 : 0);
    }
    block_sync();  // hands on what the count made known
    if (smem_load(is_last) != 0) {
      int sum = 0;
      for (int block = 0; block < num_blocks(); ++block) {
        const GmemPtr<const int32_t> readable = {shares.address};
        sum += gmem_load(readable + (block * 64 + 63 - me));
      }
      gmem_store(p.sums + (round * 64 + me), sum);
    }
    block_sync();  // orders the reads of is_last before the next round
  }
}
