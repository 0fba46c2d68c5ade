// ptx/atomics.cuh - the order of float atomics is not fixed, so no kernel that ships adds by them;
// that is here for the planted bugs and the conformance tests. Integers count work; the order of
// maxima makes no difference.
#pragma once

FC_DEVICE void smem_atomic_add(SmemPtr<float> p, float x) {
  asm volatile("red.relaxed.cta.shared.add.f32 [%0], %1;" ::"r"(p.address), "f"(x) : "memory");
}

FC_DEVICE int gmem_atomic_add(GmemPtr<int32_t> p, int x) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p.address), "r"(x)
               : "memory");
  return before;
}

// Orders this thread's accesses, and those that it knows of by barriers, with those of other blocks
// that meet it at the same counter.
FC_DEVICE int gmem_atomic_add_acq_rel(GmemPtr<int32_t> p, int x) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p.address), "r"(x)
               : "memory");
  return before;
}

// Makes visible what others released by the gmem_atomic_add_acq_rel that it finds in the sum.
FC_DEVICE int gmem_load_acquire(GmemPtr<int32_t> p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p.address) : "memory");
  return x;
}

FC_DEVICE int gmem_atomic_cas(GmemPtr<int32_t> p, int expected, int x) {
  int before;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before)
               : "l"(p.address), "r"(expected), "r"(x)
               : "memory");
  return before;
}

// Orders what this thread has done, and knows of by barriers, before its add, for every thread
// whose gmem_await finds that add in the sum.
FC_DEVICE void gmem_release_add(GmemPtr<int32_t> p, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p.address), "r"(x) : "memory");
}

// Until the counter is `value`.
FC_DEVICE void gmem_await(GmemPtr<int32_t> p, int value) {
  while (gmem_load_acquire(p) != value) {
  }
}

// As an integer: floats from 0 on are in the order of their bits, those below in the reverse order,
// and all of these are above the others where bits count as unsigned.
FC_DEVICE void gmem_atomic_max(GmemPtr<float> p, float x) {
  const int bits = x != x ? 0x7fffffff : __float_as_int(x);
  if (bits >= 0) {
    asm volatile("red.relaxed.gpu.global.max.s32 [%0], %1;" ::"l"(p.address), "r"(bits) : "memory");
  } else {
    asm volatile("red.relaxed.gpu.global.min.u32 [%0], %1;" ::"l"(p.address), "r"(bits) : "memory");
  }
}
