// ptx/mma8.cuh - products of one warp with operands B of 8 columns (PTX ISA: mma.m16n8k16), for
// query rows so few that they are columns: keys are A's rows, or V's columns are.
#pragma once

// B of a 16 x 16 x 8 product: register i of lane 4 r + c has B[k][r] and B[k + 1][r] of
// k = 2 c + 8 i.
template <class T>
struct MmaB8 {
  uint32_t reg[2];
};

// Adds A B, transposed, to elements 4 HALF to 4 HALF + 3 of an accumulator: lane 4 r + c has in
// element i of the four row 2 c + i / 2 and column r + i % 2 * 8 of the 8 x 16 result.
template <int HALF>
FC_DEVICE void mma8_transposed(WmmaAccum& accum, const WmmaA<float16>& a,
                               const MmaB8<float16>& b) {
  float (&x)[8] = accum.x;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(x[4 * HALF]), "+f"(x[4 * HALF + 2]), "+f"(x[4 * HALF + 1]), "+f"(x[4 * HALF + 3])
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
}

// An 8x8 matrix of 16-bit elements, transposed: lane 4 r + c has elements 2 c and 2 c + 1 of row r
// (PTX ISA: movmatrix).
FC_DEVICE uint32_t transpose8x8(uint32_t x) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(x));
  return transposed;
}
