// host/tma.cuh - boxes of a four-dimensional tensor between global and shared memory (PTX ISA:
// cp.async.bulk.tensor). The runtime checks a box when it is issued and moves it at a moment that
// the scheduler picks.
#pragma once

#include "host/simulator/machine_sm90.cuh"
#include "host/memory.cuh"

// Has no effect that a kernel could see.
FC_DEVICE void tma_prefetch_map(const TensorMap&) {}

template <class T>
FC_DEVICE void tma_load(SmemPtr<T> dst, const TensorMap& map, SmemPtr<uint64_t> bar, int col,
                        int row, int head, int batch, FC_SITE) {
  fc_host::tma_load(dst.ref(), map, bar.ref(), col, row, -1, head, batch, FC_HERE);
}

// The same of a tensor in chunks of columns, all of which from `chunk` on a box has.
template <class T>
FC_DEVICE void tma_load_chunks(SmemPtr<T> dst, const TensorMap& map, SmemPtr<uint64_t> bar,
                               int col, int row, int chunk, int head, int batch, FC_SITE) {
  fc_host::tma_load(dst.ref(), map, bar.ref(), col, row, chunk, head, batch, FC_HERE);
}

template <class T>
FC_DEVICE void tma_store(const TensorMap& map, SmemPtr<T> src, int col, int row, int head,
                         int batch, FC_SITE) {
  fc_host::tma_store(map, src.ref(), col, row, head, batch, FC_HERE);
}

// Adds `bytes` of floats to as many in global memory (PTX ISA: cp.reduce.async.bulk).
FC_DEVICE void bulk_add(GmemPtr<float> dst, SmemPtr<float> src, int bytes, FC_SITE) {
  fc_host::bulk_add(dst.address, src.ref(), bytes, false, FC_HERE);
}

// The same, in place of what lies there.
FC_DEVICE void bulk_store(GmemPtr<float> dst, SmemPtr<float> src, int bytes, FC_SITE) {
  fc_host::bulk_add(dst.address, src.ref(), bytes, true, FC_HERE);
}

FC_DEVICE void tma_store_commit(FC_SITE) { fc_host::tma_store_commit(FC_HERE); }

// Until all but the newest PENDING groups are complete.
template <int PENDING>
FC_DEVICE void tma_store_wait(FC_SITE) {
  static_assert(PENDING >= 0, "a number of groups");
  fc_host::tma_store_wait(PENDING, FC_HERE);
}

// Until all but the newest PENDING groups have read their shared-memory source.
template <int PENDING>
FC_DEVICE void tma_store_wait_read(FC_SITE) {
  static_assert(PENDING >= 0, "a number of groups");
  fc_host::tma_store_wait_read(PENDING, FC_HERE);
}
