// mul2: two products a thread.
#pragma once

#include "prims_sm90.cuh"

struct PairsParams {
  GmemPtr<const uint32_t> a, b;
  GmemPtr<uint32_t> product;
};

FC_KERNEL(pairs, 128, 1)(const PairsParams p) {
  const int i = thread_idx();
  gmem_store(p.product + i, mul2<Element>(gmem_load(p.a + i), gmem_load(p.b + i)));
}
