// ptx/tma.cuh - boxes of a four-dimensional tensor, or of one in chunks of columns, between global
// and shared memory by the tensor memory accelerator (PTX ISA: cp.async.bulk.tensor). Coordinates
// count elements: column, row, head, batch. One thread issues.
#pragma once

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// Fetches the descriptor itself, ahead of its first use.
FC_DEVICE void tma_prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

template <class T>
FC_DEVICE void tma_load(SmemPtr<T> dst, const TensorMap& map, SmemPtr<uint64_t> bar, int col,
                        int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst.address),
      "l"(&map), "r"(bar.address), "r"(col), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same of a tensor in chunks of columns, all of which from `chunk` on a box has.
template <class T>
FC_DEVICE void tma_load_chunks(SmemPtr<T> dst, const TensorMap& map, SmemPtr<uint64_t> bar,
                               int col, int row, int chunk, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst.address),
      "l"(&map), "r"(bar.address), "r"(col), "r"(row), "r"(chunk), "r"(head), "r"(batch)
      : "memory");
}

template <class T>
FC_DEVICE void tma_store(const TensorMap& map, SmemPtr<T> src, int col, int row, int head,
                         int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(src.address), "r"(col), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Adds `bytes` of floats to as many in global memory (PTX ISA: cp.reduce.async.bulk), both at
// multiples of 16 bytes. Committed and waited for as stores are.
FC_DEVICE void bulk_add(GmemPtr<float> dst, SmemPtr<float> src, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
          dst.address),
      "r"(src.address), "r"(bytes)
      : "memory");
}

// The same, in place of what lies there.
FC_DEVICE void bulk_store(GmemPtr<float> dst, SmemPtr<float> src, int bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst.address),
      "r"(src.address), "r"(bytes)
      : "memory");
}

FC_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the newest PENDING groups are complete: what they wrote or added is in global
// memory, and seen by this thread.
template <int PENDING>
FC_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Until all but the newest PENDING groups have read their shared-memory source.
template <int PENDING>
FC_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
