// cp.async of BYTES bytes in three groups, waited for one after the other; some copies zero-fill
// and must not read their source, for which the last thread has a null pointer.
#pragma once

#include "prims.cuh"

struct AsyncGroupsParams {
  GmemPtr<const uint16_t> src;  // [3, 64 * BYTES / 2]
  GmemPtr<uint16_t> dst;        // [3, 64 * BYTES / 2]
};

constexpr int ELEMENTS = BYTES / 2;
constexpr int GROUP = 64 * ELEMENTS;

// Every thread hands on the packet that its mirror image in the block copied.
FC_DEVICE void hand_on(const AsyncGroupsParams& p, SmemPtr<uint16_t> buffer, int group) {
  block_sync();  // orders every thread's arrived copies before the loads below
  const int place = group * GROUP + (63 - thread_idx()) * ELEMENTS;
  gmem_store_packet(p.dst + place, smem_load_packet<BYTES>(buffer + place));
}

FC_KERNEL(async_groups, 64, 1)(const AsyncGroupsParams p) {
  const auto buffer = smem_view<uint16_t>(0, 3 * GROUP, "buffer");
  const bool valid = thread_idx() % 3 != 0;
  for (int group = 0; group < 3; ++group) {
    const int place = group * GROUP + thread_idx() * ELEMENTS;
    const GmemPtr<const uint16_t> nowhere = {};
    cp_async<BYTES>(buffer + place, valid ? p.src + place : nowhere, valid);
    cp_async_commit();
  }
  cp_async_wait<2>();
  hand_on(p, buffer, 0);
  cp_async_wait<1>();
  hand_on(p, buffer, 1);
  cp_async_commit();  // an empty group counts: one may stay open, and it is this one
  cp_async_wait<1>();
  hand_on(p, buffer, 2);
}
