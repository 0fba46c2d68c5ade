// host/async_copy.cuh - cp.async (PTX ISA: cp.async). The runtime checks a copy when it is issued,
// poisons its destination, and performs it at a moment that the scheduler picks. For an
// architecture without cp.async (FC_HOST_NO_CP_ASYNC) a copy is an ordinary load and store, as in
// ptx/async_copy.cuh.
#pragma once

#include "host/memory.cuh"

template <int BYTES, class T>
FC_DEVICE void cp_async(SmemPtr<T> dst, GmemPtr<const T> src, bool valid, FC_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#ifndef FC_HOST_NO_CP_ASYNC
  fc_host::async_issue(dst.ref(), src.address, BYTES, valid, FC_HERE);
#else
  Packet<BYTES> x = {};
  if (valid) x = gmem_load_packet<BYTES>(src, line, file);
  smem_store_packet(dst, x, line, file);
#endif
}

FC_DEVICE void cp_async_commit(FC_SITE) { fc_host::async_commit(FC_HERE); }

// Waits until at most the newest PENDING groups of this thread are still under way.
template <int PENDING>
FC_DEVICE void cp_async_wait(FC_SITE) {
  static_assert(PENDING >= 0, "a number of groups");
  fc_host::async_wait(PENDING, FC_HERE);
}
