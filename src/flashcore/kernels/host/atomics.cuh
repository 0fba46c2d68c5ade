// host/atomics.cuh - the order of float atomics is not fixed: two unordered ones to one element are
// reported, since they make results differ from run to run.
#pragma once

#include "host/memory.cuh"

FC_DEVICE void smem_atomic_add(SmemPtr<float> p, float x, FC_SITE) {
  void* place = fc_host::smem_atomic(p.ref(), 4, FC_HERE);
  float sum;
  std::memcpy(&sum, place, 4);
  sum += x;
  std::memcpy(place, &sum, 4);
}

// Of a tensor that the launch declares a counter: every thread of every block may add.
FC_DEVICE int gmem_atomic_add(GmemPtr<int32_t> p, int x, FC_SITE) {
  void* place = fc_host::gmem_atomic(p.address, 4, FC_HERE);
  int32_t before;
  std::memcpy(&before, place, 4);
  const int32_t sum = before + x;
  std::memcpy(place, &sum, 4);
  return before;
}
