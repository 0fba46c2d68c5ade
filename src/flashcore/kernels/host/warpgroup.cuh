// host/warpgroup.cuh - barriers among some warps, register budgets of warpgroups, proxy fences.
#pragma once

#include "host/simulator/machine_sm90.cuh"
#include "host/memory.cuh"

// `threads` counts all that sync or arrive, whole warps (PTX ISA: bar.sync, bar.arrive).
FC_DEVICE void named_barrier_sync(int id, int threads, FC_SITE) {
  fc_host::named_barrier(fc_host::WarpOp::named_barrier_sync, id, threads, false, FC_HERE);
}

FC_DEVICE void named_barrier_arrive(int id, int threads, FC_SITE) {
  fc_host::named_barrier(fc_host::WarpOp::named_barrier_arrive, id, threads, false, FC_HERE);
}

// named_barrier_sync by everybody; true for all when any thread's predicate is (PTX ISA: bar.red).
FC_DEVICE bool named_barrier_any(int id, int threads, bool predicate, FC_SITE) {
  return fc_host::named_barrier(fc_host::WarpOp::named_barrier_any, id, threads, predicate,
                                FC_HERE);
}

template <int REGISTERS>
FC_DEVICE void raise_registers(FC_SITE) {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0,
                "setmaxnreg takes a multiple of 8 from 24 to 256");
  fc_host::set_registers(REGISTERS, true, FC_HERE);
}

template <int REGISTERS>
FC_DEVICE void lower_registers(FC_SITE) {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0,
                "setmaxnreg takes a multiple of 8 from 24 to 256");
  fc_host::set_registers(REGISTERS, false, FC_HERE);
}

// Writes to shared memory that this thread knows of, its own among them, become visible to TMA and
// WGMMA.
FC_DEVICE void fence_proxy_async(FC_SITE) { fc_host::fence_proxy_async(FC_HERE); }

// Orders accesses to global memory that this thread knows of before its later TMA operations.
FC_DEVICE void fence_proxy_async_global(FC_SITE) { fc_host::fence_proxy_async_global(FC_HERE); }

// True in one lane of the warp, always the same; all lanes must arrive.
FC_DEVICE bool elect_lane(FC_SITE) { return fc_host::elect_lane(FC_HERE); }

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (PTX
// ISA: stmatrix).
template <class T>
FC_DEVICE void stmatrix_x4(SmemPtr<T> p, const uint32_t (&reg)[4], FC_SITE) {
  static_assert(sizeof(T) == 2, "stmatrix stores 16-bit elements");
  fc_host::store_matrices(p.ref(), reg, FC_HERE);
}

// Four 8x8 matrices of 16-bit elements, or of pairs of bytes; lane l gives the address of row l % 8
// of matrix l / 8, which is 16 bytes (PTX ISA: ldmatrix).
template <class T>
FC_DEVICE void ldmatrix_x4(SmemPtr<T> p, uint32_t (&reg)[4], FC_SITE) {
  fc_host::load_matrices(p.ref(), reg, false, FC_HERE);
}

// The same of the matrices transposed.
template <class T>
FC_DEVICE void ldmatrix_x4_trans(SmemPtr<T> p, uint32_t (&reg)[4], FC_SITE) {
  fc_host::load_matrices(p.ref(), reg, true, FC_HERE);
}
