// quantised2 of append/quantise.cuh, with a neighbour of another size, and narrow2 of the
// quotients: one element a thread.
#pragma once

#include "prims.cuh"
#include "append/quantise.cuh"

struct QuantisedParams {
  GmemPtr<const float> x;
  GmemPtr<const float> scale;
  GmemPtr<float8> element;
  GmemPtr<float8> narrowed;  // zeros where a GPU has no such instruction
  int32_t count;
};

FC_KERNEL(quantised, 128, 1)(const QuantisedParams p) {
  const int i = block_idx() * 128 + thread_idx();
  if (i >= p.count) return;
  const float x = gmem_load(p.x + i);
  const Divisor divisor = divisor_of(gmem_load(p.scale + i));
  const bool is_first = i % 2 == 0;
  const uint32_t pair = quantised2(is_first ? x : 1.0f, is_first ? 1.0f : x, divisor);
  gmem_store(p.element + i, float8{uint8_t(is_first ? pair : pair >> 8)});
  const float of_x = quotient(x, divisor);
  const uint32_t narrowed = narrow2(is_first ? of_x : 1.0f, is_first ? 1.0f : of_x);
  gmem_store(p.narrowed + i, float8{uint8_t(is_first ? narrowed : narrowed >> 8)});
}
