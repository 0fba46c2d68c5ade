// A warp loads four 8x8 matrices of 16-bit elements, in rows that its lanes name, as they are and
// transposed; takes four of eight bytes; multiplies operands that it makes in registers, also with
// 8 columns; and transposes a matrix of 8x8 that lies in registers.
#pragma once

#include "prims_sm90.cuh"

struct MatricesParams {
  GmemPtr<const uint32_t> rows;    // [32, 4]: 16 bytes a lane
  GmemPtr<uint32_t> plain;         // [32, 4]: registers by lane
  GmemPtr<uint32_t> transposed;    // [32, 4]
  GmemPtr<uint32_t> mixed;         // [32, 2]: bytes of two words
  GmemPtr<const float> a;          // [16, 16]
  GmemPtr<const float> b;          // [16, 16]
  GmemPtr<float> product;          // [16, 16]: a b, twice
  GmemPtr<float> halves;           // [2, 8, 16]: of columns 0 to 7 and 8 to 15, transposed
  GmemPtr<uint32_t> exchanged;     // [32]: the first words of `rows` as a matrix, transposed
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

  WmmaAccum x, product;
  for (int i = 0; i < 8; ++i) {
    x.x[i] = gmem_load(p.a + (accum_row(lane, i) * 16 + accum_col(lane, i)));
  }
  WmmaA<float16> a;
  wmma_accum_to_a(a, x);
  WmmaBCol<float16> b_col;
  WmmaBRow<float16> b_row;
  for (int i = 0; i < 4; ++i) {
    const auto from = p.b + ((lane % 4 * 2 + i % 2 * 8) * 16 + lane / 4 + i / 2 * 8);
    b_col.reg[i] = b_row.reg[i] = pack2<float16>(gmem_load(from), gmem_load(from + 16));
  }
  wmma_fill(product, 0.0f);
  wmma_mma(product, a, b_col);
  wmma_mma(product, a, b_row);
  for (int i = 0; i < 8; ++i) {
    gmem_store(p.product + (accum_row(lane, i) * 16 + accum_col(lane, i)), product.x[i]);
  }

  WmmaAccum halves;
  wmma_fill(halves, 0.0f);
  const MmaB8<float16> left = {{b_col.reg[0], b_col.reg[1]}};
  const MmaB8<float16> right = {{b_col.reg[2], b_col.reg[3]}};
  mma8_transposed<0>(halves, a, left);
  mma8_transposed<1>(halves, a, right);
  mma8_transposed<1>(halves, a, right);
  for (int i = 0; i < 8; ++i) {
    const int row = i / 4 * 8 + lane % 4 * 2 + i % 4 / 2;
    gmem_store(p.halves + (row * 16 + lane / 4 + i % 2 * 8), halves.x[i]);
  }
  gmem_store(p.exchanged + lane, transpose8x8(gmem_load(p.rows + lane * 4)));
}
