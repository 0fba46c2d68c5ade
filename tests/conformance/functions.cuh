// The functions of math.cuh, one argument pair a thread.
#pragma once

#include "prims.cuh"

struct FunctionsParams {
  GmemPtr<const float> x;
  GmemPtr<const float> y;
  GmemPtr<float> exp2;
  GmemPtr<float> log2;
  GmemPtr<float> rcp;
  GmemPtr<float> fma;      // x * y + x
  GmemPtr<float> maximum;  // of x and y
  GmemPtr<int32_t> bounds; // [count, 3]: min_i, max_i of the thread's number and 40, and opaque
  GmemPtr<float> neg_inf;
  int32_t count;
};

FC_KERNEL(functions, 128, 1)(const FunctionsParams p) {
  const int i = block_idx() * 128 + thread_idx();
  if (i >= p.count) return;
  const float x = gmem_load(p.x + i);
  const float y = gmem_load(p.y + i);
  gmem_store(p.exp2 + i, exp2_approx(x));
  gmem_store(p.log2 + i, log2_approx(x));
  gmem_store(p.rcp + i, rcp_approx(x));
  gmem_store(p.fma + i, fma_rn(x, y, x));
  gmem_store(p.maximum + i, max_f(x, y));
  gmem_store(p.bounds + i * 3, min_i(i, 40));
  gmem_store(p.bounds + (i * 3 + 1), max_i(i, 40));
  gmem_store(p.bounds + (i * 3 + 2), opaque(i));
  gmem_store(p.neg_inf + i, NEG_INF);
}
