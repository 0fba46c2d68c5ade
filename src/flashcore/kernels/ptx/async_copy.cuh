// ptx/async_copy.cuh - global to shared copies that do not pass through registers (PTX ISA:
// cp.async, sm_80). sm_75 has none: there a copy is an ordinary load and store that is complete at
// once.
#pragma once

template <int BYTES, class T>
FC_DEVICE void cp_async(SmemPtr<T> dst, GmemPtr<const T> src, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  // A source size below BYTES zero-fills the rest: 0 reads nothing. Only 16 bytes may bypass L1.
  const int src_bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst.address),
                 "l"(src.address), "r"(src_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst.address),
                 "l"(src.address), "n"(BYTES), "r"(src_bytes)
                 : "memory");
  }
#else
  Packet<BYTES> x = {};
  if (valid) x = gmem_load_packet<BYTES>(src);
  smem_store_packet(dst, x);
#endif
}

FC_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the newest PENDING groups of this thread are still under way.
template <int PENDING>
FC_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
