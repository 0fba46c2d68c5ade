// Reads of what another block wrote without the order that barriers and an atomic make, one a case,
// for the simulator alone; see faults.cuh.
#pragma once

#include "prims.cuh"

struct FaultsBetweenBlocksParams {
  GmemPtr<int32_t> counter;  // [1 + blocks]
  GmemPtr<int32_t> shares;   // [blocks, 64]
  GmemPtr<int32_t> sums;     // [64]
  int32_t fault;
};

FC_KERNEL(faults_between_blocks, 64, 1)(const FaultsBetweenBlocksParams p) {
  const auto is_last = smem_view<int32_t>(0, 1, "is_last");
  const int me = thread_idx();
  const auto mine = p.shares + (block_idx() * 64 + me);
  if (p.fault != 1) gmem_store(mine, me);
  if (p.fault != 2) block_sync();  // orders all writes before the count
  if (me == 0) {
    if (p.fault == 3) gmem_atomic_add_acq_rel(p.counter + (1 + block_idx()), 1);
    const bool relaxed = p.fault == 0 || p.fault == 3;
    const int before =
        relaxed ? gmem_atomic_add(p.counter, 1) : gmem_atomic_add_acq_rel(p.counter, 1);
    smem_store(is_last, before == num_blocks() - 1 ? 1 : 0);
  }
  if (p.fault == 1) gmem_store(mine, me);
  block_sync();  // hands on what the count made known
  if (smem_load(is_last) == 0) return;
  int sum = 0;
  for (int block = 0; block < num_blocks(); ++block) {
    const GmemPtr<const int32_t> shares = {p.shares.address};
    sum += gmem_load(shares + (block * 64 + 63 - me));  // ALARM
  }
  gmem_store(p.sums + me, sum);
}
