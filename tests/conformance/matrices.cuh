// A warp loads four 8x8 matrices of 16-bit elements, in rows that its lanes name, as they are and
// transposed; and takes four of eight bytes.
#pragma once

#include "prims_sm90.cuh"

struct MatricesParams {
  GmemPtr<const uint32_t> rows;    // [32, 4]: 16 bytes a lane
  GmemPtr<uint32_t> plain;         // [32, 4]: registers by lane
  GmemPtr<uint32_t> transposed;    // [32, 4]
  GmemPtr<uint32_t> mixed;         // [32, 2]: bytes of two words
};

FC_KERNEL(matrices, 32, 1)(const MatricesParams p) {
  const int lane = lane_idx();
  const auto smem = smem_view<float8>(0, 32 * 32, "smem");
  // Rows lie apart, in another order.
  const auto row = smem + (31 - lane) * 32;
  Packet<16> packet;
  for (int i = 0; i < 4; ++i) packet.word[i] = gmem_load(p.rows + (lane * 4 + i));
  smem_store_packet(row, packet);
  warp_sync();  // orders the stores before the loads below
  uint32_t plain[4], transposed[4];
  ldmatrix_x4(row, plain);
  ldmatrix_x4_trans(row, transposed);
  for (int i = 0; i < 4; ++i) {
    gmem_store(p.plain + (lane * 4 + i), plain[i]);
    gmem_store(p.transposed + (lane * 4 + i), transposed[i]);
  }
  gmem_store(p.mixed + lane * 2, permute_bytes<0x3120>(packet.word[0], packet.word[1]));
  gmem_store(p.mixed + (lane * 2 + 1), permute_bytes<0x0527>(packet.word[0], packet.word[1]));
}
