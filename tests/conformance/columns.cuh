// A warpgroup multiplies A^T B, both contiguous along m and n, and every block adds the product to
// the same sums by bulk_add, a warp its own 16 rows, in the order of the numbers that they draw.
#pragma once

#include "prims_sm90.cuh"

struct ColumnsParams {
  TensorMap a_map;      // boxes of 64 rows of A [64, 64], lines are k
  TensorMap b_map;      // boxes of 64 rows of B [64, N]
  GmemPtr<float> sums;  // [4, FRAGS, 2, 32, 4]: warp, fragment, half of its registers, lane
  GmemPtr<int32_t> counters;  // [4, 2]: numbers drawn, and how many have added
};

constexpr int N = FRAGS * 16;
constexpr int CHUNK = ROW_BYTES / 2;
constexpr int COLS = (N + CHUNK - 1) / CHUNK * CHUNK;  // the last box may end in zeros
constexpr int B_OFFSET = 64 * 64 * 2;
constexpr int OUT_OFFSET = B_OFFSET + COLS * 64 * 2;
constexpr int WARP_FLOATS = FRAGS * 8 * 32;
constexpr int BAR_OFFSET = OUT_OFFSET + 4 * WARP_FLOATS * 4;

FC_KERNEL(columns, 128, 1)(FC_PARAM(ColumnsParams) p) {
  const auto a_smem = smem_view<Element>(0, 64 * 64, "a_smem");
  const auto b_smem = smem_view<Element>(B_OFFSET, COLS * 64, "b_smem");
  const auto out = smem_view<float>(OUT_OFFSET, 4 * WARP_FLOATS, "out_smem");
  const auto bar = smem_view<uint64_t>(BAR_OFFSET, 1, "bar");
  if (thread_idx() == 0) {
    mbar_init(bar, 1);
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  if (thread_idx() == 0) {
    mbar_arrive_expect_tx(bar, OUT_OFFSET);
    tma_load(a_smem, p.a_map, bar, 0, 0, 0, 0);
    for (int n = 0; n < N; n += CHUNK) tma_load(b_smem + 64 * n, p.b_map, bar, n, 0, 0, 0);
  }
  WmmaAccum product[FRAGS];
  for (int n = 0; n < FRAGS; ++n) wmma_fill(product[n], 1e30f);  // not to be added
  mbar_wait(bar, 0);
  const WgmmaDesc a_desc = wgmma_desc<128>(a_smem, 0);
  const WgmmaDesc b_desc = wgmma_desc<ROW_BYTES>(b_smem, 64 * ROW_BYTES);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 64; k += 16) {
    wgmma_ss_mn<Element>(product, a_desc + k * 128, b_desc + k * ROW_BYTES, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(product);
  const auto own = out + warp_idx() * WARP_FLOATS;
  for (int n = 0; n < FRAGS; ++n) {
    for (int i = 0; i < 8; ++i) {
      smem_store(own + (((n * 2 + i / 4) * 32 + lane_idx()) * 4 + i % 4), product[n].x[i]);
    }
  }
  fence_proxy_async();
  warp_sync();  // orders the writes above before they are read
  if (elect_lane()) {
    const auto counter = p.counters + warp_idx() * 2;
    gmem_await(counter + 1, gmem_atomic_add(counter, 1));
    fence_proxy_async_global();
    bulk_add(p.sums + warp_idx() * WARP_FLOATS, own, WARP_FLOATS * 4);
    tma_store_commit();
    tma_store_wait<0>();
    gmem_release_add(counter + 1, 1);
  }
}
