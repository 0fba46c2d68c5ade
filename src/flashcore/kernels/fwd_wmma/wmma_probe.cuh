// wmma_probe.cuh - checks on the GPU at hand the element map that the kernels rely on
// (ptx/wmma.cuh).
//
// A[m][k] = 16 m + k, exact in float16 and bfloat16, and B[k][n] = 1 where n = (k + 1) % 16: so
// (A B)[m][n] = 16 m + (n + 15) % 16, different in every element. The product, and the product of
// its accumulator handed on as an A operand, must sit where accum_row and accum_col say.
#pragma once

#include "prims.cuh"

struct ProbeParams {
  GmemPtr<float> mismatches;  // [32]: wrong elements seen by each lane
};

constexpr int PROBE_STRIDE = 24;

FC_DEVICE float count_mismatches(const WmmaAccum& accum, int shift) {
  float mismatches = 0.0f;
  for (int i = 0; i < 8; ++i) {
    const int row = accum_row(lane_idx(), i);
    const int col = (accum_col(lane_idx(), i) + 16 - shift) % 16;
    mismatches += accum.x[i] == float(16 * row + col) ? 0.0f : 1.0f;
  }
  return mismatches;
}

FC_KERNEL(wmma_probe, 32, 1)(const ProbeParams p) {
  const auto a_smem = smem_view<Element>(0, 16 * PROBE_STRIDE, "a_smem");
  const auto b_smem = smem_view<Element>(16 * PROBE_STRIDE * 2, 16 * PROBE_STRIDE, "b_smem");
  const auto bt_smem = smem_view<Element>(32 * PROBE_STRIDE * 2, 16 * PROBE_STRIDE, "bt_smem");
  for (int i = lane_idx(); i < 256; i += 32) {
    const int row = i / 16;
    const int col = i % 16;
    const float one = (row + 1) % 16 == col ? 1.0f : 0.0f;
    smem_store(a_smem + (row * PROBE_STRIDE + col), from_float<Element>(float(i)));
    smem_store(b_smem + (row * PROBE_STRIDE + col), from_float<Element>(one));
    smem_store(bt_smem + (col * PROBE_STRIDE + row), from_float<Element>(one));
  }
  warp_sync();  // orders the writes above before the fragment loads

  WmmaA<Element> a;
  WmmaBRow<Element> b_row;
  WmmaBCol<Element> b_col;
  wmma_load_a(a, a_smem, PROBE_STRIDE);
  wmma_load_b_row(b_row, b_smem, PROBE_STRIDE);
  wmma_load_b_col(b_col, bt_smem, PROBE_STRIDE);

  WmmaAccum by_row, by_col, chained;
  wmma_fill(by_row, 0.0f);
  wmma_fill(by_col, 0.0f);
  wmma_fill(chained, 0.0f);
  wmma_mma(by_row, a, b_row);
  wmma_mma(by_col, a, b_col);
  wmma_accum_to_a(a, by_row);
  wmma_mma(chained, a, b_row);

  const float mismatches =
      count_mismatches(by_row, 1) + count_mismatches(by_col, 1) + count_mismatches(chained, 2);
  gmem_store(p.mismatches + lane_idx(), mismatches);
}
