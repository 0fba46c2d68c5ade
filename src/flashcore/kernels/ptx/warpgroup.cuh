// ptx/warpgroup.cuh - barriers among some warps, register budgets of warpgroups, proxy fences.
#pragma once

// `threads` counts all that sync or arrive, whole warps (PTX ISA: bar.sync, bar.arrive). Orders the
// memory of those that arrive before that of those that sync. Id 0 is block_sync()'s.
FC_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

FC_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// named_barrier_sync by everybody; true for all when any thread's predicate is (PTX ISA: bar.red).
FC_DEVICE bool named_barrier_any(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.s32 mine, %3, 0;\n"
      "bar.red.or.pred all, %1, %2, mine;\n"
      "selp.s32 %0, 1, 0, all;\n"
      "}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int(predicate))
      : "memory");
  return any != 0;
}

template <int REGISTERS>
FC_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
FC_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Writes to shared memory that this thread knows of, its own among them, become visible to TMA and
// WGMMA.
FC_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders this thread's accesses to global memory, and those that it waited for, before the TMA
// operations that it issues from here on.
FC_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// True in one lane of the warp; all lanes must arrive.
FC_DEVICE bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (PTX
// ISA: stmatrix).
template <class T>
FC_DEVICE void stmatrix_x4(SmemPtr<T> p, const uint32_t (&reg)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(p.address),
               "r"(reg[0]), "r"(reg[1]), "r"(reg[2]), "r"(reg[3])
               : "memory");
}

// Four 8x8 matrices of 16-bit elements, or of pairs of bytes; lane l gives the address of row l % 8
// of matrix l / 8, which is 16 bytes (PTX ISA: ldmatrix).
template <class T>
FC_DEVICE void ldmatrix_x4(SmemPtr<T> p, uint32_t (&reg)[4]) {
  ldmatrix_x4(reg, p.address);
}

// The same of the matrices transposed.
template <class T>
FC_DEVICE void ldmatrix_x4_trans(SmemPtr<T> p, uint32_t (&reg)[4]) {
  ldmatrix_x4_trans(reg, p.address);
}
