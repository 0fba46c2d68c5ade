// Boxes by TMA of a tensor in chunks of 64 columns: eight rows of three chunks in each of two
// batches, copied out as they lie in shared memory (swizzled).
#pragma once

#include "prims_sm90.cuh"

struct TmaChunksParams {
  TensorMap in;
  GmemPtr<const int32_t> boxes;  // [num_boxes, 4]: row, chunk, head, batch
  GmemPtr<uint16_t> raw;         // [num_boxes, 2, 3, 8, 64]
  int32_t num_boxes;
};

constexpr int BOX = 2 * 3 * 8 * 64;

FC_KERNEL(tma_chunks, 64, 1)(FC_PARAM(TmaChunksParams) p) {
  const auto buffers = smem_view<uint16_t>(0, 2 * BOX, "buffers");
  const auto bars = smem_view<uint64_t>(2 * BOX * 2, 2, "bars");
  if (thread_idx() == 0) {
    tma_prefetch_map(p.in);
    mbar_init(bars, 1);
    mbar_init(bars + 1, 1);
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  for (int i = 0; i < p.num_boxes; ++i) {
    const auto buffer = buffers + i % 2 * BOX;
    const auto bar = bars + i % 2;
    if (thread_idx() == 0) {
      int at[4];
      for (int d = 0; d < 4; ++d) at[d] = gmem_load(p.boxes + (i * 4 + d));
      mbar_arrive_expect_tx(bar, BOX * 2);
      tma_load_chunks(buffer, p.in, bar, 0, at[0], at[1], at[2], at[3]);
    }
    mbar_wait(bar, i / 2 % 2);
    for (int e = thread_idx(); e < BOX; e += 64) {
      gmem_store(p.raw + (i * BOX + e), smem_load(buffer + e));
    }
    block_sync();  // orders every thread's loads before the next box
  }
}
