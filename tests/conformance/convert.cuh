// to_float, from_float, pack2: one value a thread.
#pragma once

#include "prims.cuh"

struct ConvertParams {
  GmemPtr<const Element> narrow;
  GmemPtr<const float> wide;
  GmemPtr<float> widened;
  GmemPtr<Element> narrowed;
  GmemPtr<uint32_t> packed;  // (narrowed[i], narrowed[i ^ 1])
  int32_t count;
};

FC_KERNEL(convert, 128, 1)(const ConvertParams p) {
  const int i = block_idx() * 128 + thread_idx();
  if (i < p.count) {
    const float x = gmem_load(p.wide + i);
    gmem_store(p.widened + i, to_float(gmem_load(p.narrow + i)));
    gmem_store(p.narrowed + i, from_float<Element>(x));
    gmem_store(p.packed + i, pack2<Element>(x, gmem_load(p.wide + (i ^ 1))));
  }
}
