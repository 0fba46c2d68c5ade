// A warpgroup multiplies 64 x 64 by 64 x N: A and B from shared memory, both contiguous along k;
// and A from registers, B contiguous along n. Both products are under way together. Then A from
// shared memory and B contiguous along n.
#pragma once

#include "prims_sm90.cuh"

struct ProductsParams {
  TensorMap a_map;              // boxes of 64 rows of A [64, K]
  TensorMap b_map;              // boxes of N rows of B [N, K]
  TensorMap bt_map;             // boxes of K rows of Bt [K, N]
  GmemPtr<const Element> a;     // [64, K]
  GmemPtr<const float> c;       // [64, N]
  GmemPtr<float> by_smem;       // A B^T + C
  GmemPtr<float> by_registers;  // A Bt
  GmemPtr<float> by_both;       // A B^T + C, A from registers
};

constexpr int K = 64;
constexpr int N = FRAGS * 16;
constexpr int CHUNK = ROW_BYTES / 2;
constexpr int B_OFFSET = 64 * K * 2;
constexpr int BT_OFFSET = B_OFFSET + N * K * 2;
constexpr int BT_COLS = (N + CHUNK - 1) / CHUNK * CHUNK;  // the last box may end in zeros
constexpr int BAR_OFFSET = BT_OFFSET + BT_COLS * K * 2;

FC_KERNEL(products, 128, 1)(FC_PARAM(ProductsParams) p) {
  const auto a_smem = smem_view<Element>(0, 64 * K, "a_smem");
  const auto b_smem = smem_view<Element>(B_OFFSET, N * K, "b_smem");
  const auto bt_smem = smem_view<Element>(BT_OFFSET, BT_COLS * K, "bt_smem");
  const auto bar = smem_view<uint64_t>(BAR_OFFSET, 1, "bar");
  if (thread_idx() == 0) {
    mbar_init(bar, 1);
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  if (thread_idx() == 0) {
    mbar_arrive_expect_tx(bar, BAR_OFFSET);
    for (int k = 0; k < K; k += CHUNK) {
      tma_load(a_smem + 64 * k, p.a_map, bar, k, 0, 0, 0);
      tma_load(b_smem + N * k, p.b_map, bar, k, 0, 0, 0);
    }
    for (int n = 0; n < N; n += CHUNK) tma_load(bt_smem + K * n, p.bt_map, bar, n, 0, 0, 0);
  }

  const int lane = lane_idx();
  const int first_row = warp_idx() * 16;
  WmmaAccum by_smem[FRAGS], by_registers[FRAGS];
  WmmaA<Element> a[K / 16];
  for (int n = 0; n < FRAGS; ++n) {
    for (int i = 0; i < 8; ++i) {
      const int place = (first_row + accum_row(lane, i)) * N + n * 16 + accum_col(lane, i);
      by_smem[n].x[i] = gmem_load(p.c + place);
      by_registers[n].x[i] = 1e30f;  // not to be added
    }
  }
  for (int k = 0; k < K / 16; ++k) {
    WmmaAccum values;
    for (int i = 0; i < 8; ++i) {
      const int place = (first_row + accum_row(lane, i)) * K + k * 16 + accum_col(lane, i);
      values.x[i] = to_float(gmem_load(p.a + place));
    }
    wmma_accum_to_a(a[k], values);
  }
  mbar_wait(bar, 0);
  wgmma_fence();
  const WgmmaDesc a_desc = wgmma_desc<ROW_BYTES>(a_smem, 0);
  const WgmmaDesc b_desc = wgmma_desc<ROW_BYTES>(b_smem, 0);
  const WgmmaDesc bt_desc = wgmma_desc<ROW_BYTES>(bt_smem, K * ROW_BYTES);
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    const int chunk = k / CHUNK;
    const int col_bytes = k % CHUNK * 2;
    wgmma_ss<Element>(by_smem, a_desc + (chunk * 64 * ROW_BYTES + col_bytes),
                      b_desc + (chunk * N * ROW_BYTES + col_bytes), true);
  }
  wgmma_commit();
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
    wgmma_rs<Element>(by_registers, a[k], bt_desc + k * 16 * ROW_BYTES, k > 0);
  }
  wgmma_commit();
  wgmma_wait<1>();
  wgmma_hold(by_smem);
  for (int n = 0; n < FRAGS; ++n) {
    for (int i = 0; i < 8; ++i) {
      const int place = (first_row + accum_row(lane, i)) * N + n * 16 + accum_col(lane, i);
      gmem_store(p.by_smem + place, by_smem[n].x[i]);
    }
  }
  wgmma_wait<0>();
  wgmma_hold(by_registers);
  for (int n = 0; n < FRAGS; ++n) {
    for (int i = 0; i < 8; ++i) {
      const int place = (first_row + accum_row(lane, i)) * N + n * 16 + accum_col(lane, i);
      gmem_store(p.by_registers + place, by_registers[n].x[i]);
      by_smem[n].x[i] = gmem_load(p.c + place);
    }
  }
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    const int chunk = k / CHUNK;
    const int col_bytes = k % CHUNK * 2;
    wgmma_rs_k<Element>(by_smem, a[k / 16], b_desc + (chunk * N * ROW_BYTES + col_bytes), true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(by_smem);
  for (int n = 0; n < FRAGS; ++n) {
    for (int i = 0; i < 8; ++i) {
      const int place = (first_row + accum_row(lane, i)) * N + n * 16 + accum_col(lane, i);
      gmem_store(p.by_both + place, by_smem[n].x[i]);
    }
  }
}
