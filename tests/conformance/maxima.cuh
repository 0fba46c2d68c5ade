// gmem_atomic_max: every thread of every block raises the same floats, in whatever order.
#pragma once

#include "prims.cuh"

struct MaximaParams {
  GmemPtr<const float> values;  // [blocks * 64, NUM_MAXIMA]
  GmemPtr<float> largest;       // [NUM_MAXIMA]
};

FC_KERNEL(maxima, 64, 1)(const MaximaParams p) {
  const auto mine = p.values + (block_idx() * 64 + thread_idx()) * NUM_MAXIMA;
  for (int i = 0; i < NUM_MAXIMA; ++i) gmem_atomic_max(p.largest + i, gmem_load(mine + i));
}
