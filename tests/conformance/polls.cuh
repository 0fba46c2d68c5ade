// gmem_load_acquire and gmem_atomic_cas: blocks write shares, count them, and look at the counter
// until all are there, or they have looked so often that they leave and count that in the upper
// half. Whoever has seen all shares reads them, every thread those of other threads.
#pragma once

#include "prims.cuh"

struct PollsParams {
  GmemPtr<int32_t> counter;  // [1]
  GmemPtr<int32_t> shares;   // [blocks, 64]
  GmemPtr<int32_t> sums;     // [blocks, 64], -1 of a block that left
  int32_t most_polls;
};

constexpr int ONE_LEFT = 1 << 16;

FC_DEVICE bool sees_all(const PollsParams& p) {
  int seen = gmem_atomic_add_acq_rel(p.counter, 1) + 1;
  for (int polls = 0; seen % ONE_LEFT < num_blocks(); ++polls) {
    const bool leaves =
        polls >= p.most_polls && gmem_atomic_cas(p.counter, seen, seen + ONE_LEFT) == seen;
    if (leaves) return false;
    seen = gmem_load_acquire(p.counter);
  }
  return true;
}

FC_KERNEL(polls, 64, 1)(const PollsParams p) {
  const auto told = smem_view<int32_t>(0, 1, "told");
  const int me = thread_idx();
  gmem_store(p.shares + (block_idx() * 64 + me), block_idx() * 1000 + me);
  block_sync();  // orders all writes before the count
  if (me == 0) smem_store(told, sees_all(p) ? 1 : 0);
  block_sync();  // hands on what the counter made known
  int sum = smem_load(told) - 1;
  for (int block = 0; sum >= 0 && block < num_blocks(); ++block) {
    const GmemPtr<const int32_t> readable = {p.shares.address};
    sum += gmem_load(readable + (block * 64 + 63 - me));
  }
  gmem_store(p.sums + (block_idx() * 64 + me), sum);
}
