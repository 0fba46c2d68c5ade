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
