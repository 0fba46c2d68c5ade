// ptx/atomics.cuh - the order of float atomics is not fixed, so no kernel that ships uses them;
// they are here for the planted bugs and the conformance tests. Integers count work.
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
