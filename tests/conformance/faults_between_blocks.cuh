// Reads of what another block wrote without the order that fences, an atomic and barriers make, one
// a case, for the simulator alone; see faults.cuh.
#pragma once

#include "prims.cuh"

struct FaultsBetweenBlocksParams {
  GmemPtr<int32_t> counter;  // [blocks + 1]
  GmemPtr<int32_t> shares;   // [blocks, 64]
  GmemPtr<int32_t> sums;     // [64]
  int32_t fault;
};

FC_KERNEL(faults_between_blocks, 64, 1)(const FaultsBetweenBlocksParams p) {
  const auto is_last = smem_view<int32_t>(0, 1, "is_last");
  const int me = thread_idx();
  const auto mine = p.shares + (block_idx() * 64 + me);
  if (p.fault != 2) gmem_store(mine, me);
  if (p.fault != 3) block_sync();  // orders all writes before the fence
  if (p.fault == 4 && me == 1) gmem_fence();  // by another thread than counts
  if (me == 0) {
    if (p.fault != 0 && p.fault != 4) gmem_fence();
    const int before = gmem_atomic_add(p.counter, 1);
    if (p.fault != 1) gmem_fence();
    smem_store(is_last, before == num_blocks() - 1 ? 1 : 0);
  }
  if (p.fault == 2) gmem_store(mine, me);  // behind the count
  block_sync();  // hands on what the fence made known
  if (smem_load(is_last) == 0) return;
  int sum = 0;
  for (int block = 0; block < num_blocks(); ++block) {
    const GmemPtr<const int32_t> shares = {p.shares.address};
    sum += gmem_load(shares + (block * 64 + 63 - me));  // ALARM
  }
  gmem_store(p.sums + me, sum);
}
