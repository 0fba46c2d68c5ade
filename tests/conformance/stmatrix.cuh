// Every warp stores a 16 x 16 tile of 16-bit elements from accumulator fragments.
#pragma once

#include "prims_sm90.cuh"

struct StmatrixParams {
  GmemPtr<Element> out;  // [4, 16, 16]: 256 warp + 16 row + column
};

constexpr int STRIDE = 24;

FC_KERNEL(stmatrix, 128, 1)(const StmatrixParams p) {
  const auto tiles = smem_view<Element>(0, 4 * 16 * STRIDE, "tiles");
  const auto tile = tiles + warp_idx() * 16 * STRIDE;
  const int lane = lane_idx();
  uint32_t packed[4];
  for (int i = 0; i < 8; i += 2) {
    const int place = accum_row(lane, i) * 16 + accum_col(lane, i);
    packed[i / 2] = pack2<Element>(float(place), float(place + 1));
  }
  // Matrices 0 and 1 are rows 0-7 and 8-15 of the left half, 2 and 3 of the right half.
  stmatrix_x4(tile + (lane % 16 * STRIDE + lane / 16 * 8), packed);
  warp_sync();  // orders the stores before the loads below
  for (int e = lane; e < 256; e += 32) {
    const float x = to_float(smem_load(tile + (e / 16 * STRIDE + e % 16)));
    gmem_store(p.out + (warp_idx() * 256 + e), from_float<Element>(x));
  }
}
