// One warp multiplies 16x16 matrices: A * B with A and B from both layouts, added to C, and (A * B)
// rounded to Element as the A operand of a second product. Rows of shared memory are STRIDE
// elements apart.
#pragma once

#include "prims.cuh"

struct FragmentsParams {
  GmemPtr<const Element> a;  // [16, 16]
  GmemPtr<const Element> b;  // [16, 16]
  GmemPtr<const float> c;    // [16, 16]
  GmemPtr<float> by_row;     // A B + C, B loaded by rows
  GmemPtr<float> by_col;     // A B + C, A and B loaded from their transposes
  GmemPtr<float> chained;    // round(A B + C) B
  GmemPtr<int32_t> map;      // [32, 8, 2]: accum_row and accum_col
};

constexpr int STRIDE = 24;
constexpr int TILE = 16 * STRIDE;

FC_DEVICE void store_accum(GmemPtr<float> dst, const WmmaAccum& accum) {
  for (int i = 0; i < 8; ++i) {
    gmem_store(dst + (accum_row(lane_idx(), i) * 16 + accum_col(lane_idx(), i)), accum.x[i]);
  }
}

FC_KERNEL(fragments, 32, 1)(const FragmentsParams p) {
  const auto tiles = smem_view<Element>(128, 4 * TILE, "tiles");
  for (int i = lane_idx(); i < 256; i += 32) {
    const int row = i / 16;
    const int col = i % 16;
    smem_store(tiles + (row * STRIDE + col), gmem_load(p.a + i));
    smem_store(tiles + (TILE + row * STRIDE + col), gmem_load(p.b + i));
    smem_store(tiles + (2 * TILE + col * STRIDE + row), gmem_load(p.b + i));
    smem_store(tiles + (3 * TILE + col * STRIDE + row), gmem_load(p.a + i));
  }
  warp_sync();  // orders the stores above before the fragment loads

  WmmaA<Element> a, a_col;
  WmmaBRow<Element> b_row;
  WmmaBCol<Element> b_col;
  wmma_load_a(a, tiles, STRIDE);
  wmma_load_a_col(a_col, tiles + 3 * TILE, STRIDE);
  wmma_load_b_row(b_row, tiles + TILE, STRIDE);
  wmma_load_b_col(b_col, tiles + 2 * TILE, STRIDE);

  WmmaAccum by_row, by_col, chained;
  for (int i = 0; i < 8; ++i) {
    const float c = gmem_load(p.c + (accum_row(lane_idx(), i) * 16 + accum_col(lane_idx(), i)));
    by_row.x[i] = c;
    by_col.x[i] = c;
  }
  wmma_mma(by_row, a, b_row);
  wmma_mma(by_col, a_col, b_col);
  WmmaA<Element> product;
  wmma_accum_to_a(product, by_row);
  wmma_fill(chained, 0.0f);
  wmma_mma(chained, product, b_row);
  store_accum(p.by_row, by_row);
  store_accum(p.by_col, by_col);
  store_accum(p.chained, chained);
  for (int i = 0; i < 8; ++i) {
    const auto entry = p.map + (lane_idx() * 8 + i) * 2;
    gmem_store(entry, accum_row(lane_idx(), i));
    gmem_store(entry + 1, accum_col(lane_idx(), i));
  }
}
