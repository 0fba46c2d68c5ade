// host/atomics.cuh - the order of float atomics is not fixed: two unordered ones to one element are
// reported, since they make results differ from run to run.
#pragma once

#include "host/memory.cuh"

FC_DEVICE void smem_atomic_add(SmemPtr<float> p, float x, FC_SITE) {
  void* place = fc_host::smem_atomic(p.ref(), 4, FC_HERE);
  float sum;
  std::memcpy(&sum, place, 4);
  sum += x;
  std::memcpy(place, &sum, 4);
}

namespace fc_host {

inline int32_t add(void* place, int32_t x) {
  int32_t before;
  std::memcpy(&before, place, 4);
  const int32_t sum = before + x;
  std::memcpy(place, &sum, 4);
  return before;
}

}  // namespace fc_host

// Of a tensor that the launch declares a counter: every thread of every block may add.
FC_DEVICE int gmem_atomic_add(GmemPtr<int32_t> p, int x, FC_SITE) {
  return fc_host::add(fc_host::gmem_atomic(p.address, 4, FC_HERE), x);
}

// Orders this thread's accesses, and those that it knows of by barriers, with those of other blocks
// that meet it at the same counter.
FC_DEVICE int gmem_atomic_add_acq_rel(GmemPtr<int32_t> p, int x, FC_SITE) {
  void* place = fc_host::gmem_atomic(p.address, 4, FC_HERE);
  fc_host::meet_blocks(p.address);
  return fc_host::add(place, x);
}

// Makes visible what others released by the gmem_atomic_add_acq_rel that it finds in the sum.
FC_DEVICE int gmem_load_acquire(GmemPtr<int32_t> p, FC_SITE) {
  const void* place = fc_host::gmem_atomic(p.address, 4, FC_HERE);
  fc_host::let_blocks_run();
  fc_host::learn_of_blocks(p.address);
  int32_t x;
  std::memcpy(&x, place, 4);
  return x;
}

FC_DEVICE int gmem_atomic_cas(GmemPtr<int32_t> p, int expected, int x, FC_SITE) {
  void* place = fc_host::gmem_atomic(p.address, 4, FC_HERE);
  fc_host::let_blocks_run();
  int32_t before;
  std::memcpy(&before, place, 4);
  if (before == expected) std::memcpy(place, &x, 4);
  return before;
}

// Makes known what this thread has done to every thread whose gmem_await finds the add in the sum.
FC_DEVICE void gmem_release_add(GmemPtr<int32_t> p, int x, FC_SITE) {
  void* place = fc_host::gmem_atomic(p.address, 4, FC_HERE);
  fc_host::release_to_blocks(p.address);
  fc_host::add(place, x);
  fc_host::let_blocks_run();
}

// Until the counter is `value`. Other blocks go on meanwhile.
FC_DEVICE void gmem_await(GmemPtr<int32_t> p, int value, FC_SITE) {
  fc_host::await_counter(p.address, value, FC_HERE);
}

// Of a float32 tensor that the launch declares a counter. NaN is larger than any number.
FC_DEVICE void gmem_atomic_max(GmemPtr<float> p, float x, FC_SITE) {
  void* place = fc_host::gmem_atomic(p.address, 4, FC_HERE);
  float before;
  std::memcpy(&before, place, 4);
  if (x != x || x > before) std::memcpy(place, &x, 4);
}
