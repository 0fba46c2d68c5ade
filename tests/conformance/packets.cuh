// Packets of BYTES bytes: global to shared, and back from a neighbour's place; single elements too.
#pragma once

#include "prims.cuh"

struct PacketsParams {
  GmemPtr<const uint16_t> src;  // [128 * BYTES / 2]
  GmemPtr<uint16_t> dst;        // packets in reverse order
  GmemPtr<uint16_t> single;     // [128]: the first element of each packet
};

constexpr int ELEMENTS = BYTES / 2;

FC_KERNEL(packets, 128, 1)(const PacketsParams p) {
  const auto buffer = smem_view<uint16_t>(256, 128 * ELEMENTS, "buffer");
  const auto singles = smem_view<uint16_t>(256 + 128 * BYTES, 128, "singles");
  const int mine = thread_idx() * ELEMENTS;
  const int other = (127 - thread_idx()) * ELEMENTS;
  smem_store_packet(buffer + mine, gmem_load_packet<BYTES>(p.src + mine));
  smem_store(singles + thread_idx(), gmem_load(p.src + mine));
  block_sync();  // orders the stores above before the loads of the mirrored thread's packets
  gmem_store_packet(p.dst + mine, smem_load_packet<BYTES>(buffer + other));
  gmem_store(p.single + thread_idx(), smem_load(singles + thread_idx()));
}
