// Boxes of 16 rows by TMA: loaded, copied out as they lie in shared memory (swizzled), and stored
// to the same place of another tensor. Boxes may stick out of the tensor on every side.
#pragma once

#include "prims_sm90.cuh"

struct TmaBoxesParams {
  TensorMap in;
  TensorMap out;
  GmemPtr<const int32_t> boxes;  // [num_boxes, 5]: column, row, head, batch, whether to store
  GmemPtr<uint16_t> raw;         // [num_boxes, 16, COLS]
  int32_t num_boxes;
};

constexpr int COLS = ROW_BYTES / 2;
constexpr int BOX = 16 * COLS;

FC_KERNEL(tma_boxes, 64, 1)(FC_PARAM(TmaBoxesParams) p) {
  const auto buffers = smem_view<uint16_t>(0, 2 * BOX, "buffers");
  const auto bars = smem_view<uint64_t>(2 * BOX * 2, 2, "bars");
  if (thread_idx() == 0) {
    tma_prefetch_map(p.in);
    tma_prefetch_map(p.out);
    mbar_init(bars, 1);
    mbar_init(bars + 1, 1);
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  for (int i = 0; i < p.num_boxes; ++i) {
    const auto buffer = buffers + i % 2 * BOX;
    const auto bar = bars + i % 2;
    int at[5];
    for (int d = 0; d < 5; ++d) at[d] = gmem_load(p.boxes + (i * 5 + d));
    if (thread_idx() == 0) {
      tma_store_wait_read<1>();  // of the box before the last, which used this buffer
      mbar_arrive_expect_tx(bar, BOX * 2);
      tma_load(buffer, p.in, bar, at[0], at[1], at[2], at[3]);
    }
    mbar_wait(bar, i / 2 % 2);
    for (int e = thread_idx(); e < BOX; e += 64) {
      gmem_store(p.raw + (i * BOX + e), smem_load(buffer + e));
    }
    if (thread_idx() == 0) {
      if (at[4] != 0) tma_store(p.out, buffer, at[0], at[1], at[2], at[3]);
      tma_store_commit();
    }
    block_sync();  // orders every thread's loads before the next box
  }
  if (thread_idx() == 0) tma_store_wait_read<0>();
}
