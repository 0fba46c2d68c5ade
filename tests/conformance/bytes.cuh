// Elements of one byte through shared memory; how far an address lies past a multiple.
#pragma once

#include "prims.cuh"

struct BytesParams {
  GmemPtr<const bool> src;  // [128]
  GmemPtr<bool> dst;        // in reverse order
  GmemPtr<int32_t> past;    // [128, 2]: of src's elements, multiples of 4 and of 16
};

FC_KERNEL(bytes, 128, 1)(const BytesParams p) {
  const auto buffer = smem_view<bool>(256, 128, "buffer");
  const int i = thread_idx();
  smem_store(buffer + i, gmem_load(p.src + i));
  block_sync();  // orders the stores above before the loads of the mirrored thread's byte
  gmem_store(p.dst + i, smem_load(buffer + (127 - i)));
  gmem_store(p.past + i * 2, misalignment<4>(p.src + i));
  gmem_store(p.past + (i * 2 + 1), misalignment<16>(p.src + i));
}
