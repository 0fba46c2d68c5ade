// quantised of append/quantise.cuh: one element a thread.
#pragma once

#include "prims.cuh"
#include "append/quantise.cuh"

struct QuantisedParams {
  GmemPtr<const float> x;
  GmemPtr<const float> scale;
  GmemPtr<float8> element;
  int32_t count;
};

FC_KERNEL(quantised, 128, 1)(const QuantisedParams p) {
  const int i = block_idx() * 128 + thread_idx();
  if (i >= p.count) return;
  gmem_store(p.element + i, quantised(gmem_load(p.x + i), divisor_of(gmem_load(p.scale + i))));
}
