// widen4_by_integers: four bytes a thread.
#pragma once

#include "prims.cuh"
#include "fwd_wmma/float8_wmma.cuh"

struct Float8ByIntegersParams {
  GmemPtr<const uint32_t> words;
  GmemPtr<uint32_t> pairs;  // two of each word
  int32_t count;
};

FC_KERNEL(float8_by_integers, 128, 1)(const Float8ByIntegersParams p) {
  const int i = block_idx() * 128 + thread_idx();
  if (i < p.count) {
    uint32_t pairs[2];
    widen4_by_integers<Element>(gmem_load(p.words + i), pairs);
    gmem_store(p.pairs + 2 * i, pairs[0]);
    gmem_store(p.pairs + (2 * i + 1), pairs[1]);
  }
}
