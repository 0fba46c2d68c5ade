// smem_atomic_add, in an order that barriers fix: without them the simulator reports it. Of
// gmem_atomic_add no order is asked.
#pragma once

#include "prims.cuh"

struct AtomicsParams {
  GmemPtr<float> sums;         // [64]
  GmemPtr<int32_t> counter;    // [2]
  GmemPtr<int32_t> drawn;      // [blocks, 64]
};

FC_KERNEL(atomics, 64, 1)(const AtomicsParams p) {
  const auto sums = smem_view<float>(0, 64, "sums");
  const int me = thread_idx();
  smem_store(sums + me, 0.5f);
  for (int i = 0; i < 3; ++i) smem_atomic_add(sums + me, float(me));
  block_sync();  // orders a thread's own additions before the other's
  smem_atomic_add(sums + (63 - me), 1000.0f);
  block_sync();  // orders all additions before the loads
  if (block_idx() == 0) gmem_store(p.sums + me, smem_load(sums + me));
  const int number = gmem_atomic_add(p.counter, 3);
  gmem_store(p.drawn + (block_idx() * 64 + me), number);
  gmem_atomic_add(p.counter + 1, -number);
}
