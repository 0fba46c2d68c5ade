// ptx/wmma.cuh - 16x16x16 tensor-core fragments of one warp (PTX ISA: wmma.load, wmma.mma).
//
// The element map. PTX leaves it open which lane holds which element of a wmma fragment; from sm_75
// on it is mma.sync's documented one (PTX ISA: mma.m16n8k16), two 16x8 halves side by side:
//   accumulator: lane 4*r+c holds rows {r, r+8}, columns {2c, 2c+1} of the left half in x[0..3] and
//   of the right half in x[4..7];
//   A: register 0 = row r, columns 2c..2c+1; 1 = row r+8; 2, 3 = columns + 8;
//   B: register 0 = rows 2c..2c+1 of column r; 1 = rows + 8; 2, 3 = column r+8.
// The softmax works on accumulators by this map, and P goes from accumulator to A operand without
// leaving registers. The map is checked on the GPU at hand before a kernel's first run (probe.cuh).
#pragma once

// wmma.mma on float16 names eight A (and B) registers, of which sm_75 and later read the first
// four.
template <class T>
struct WmmaA {
  uint32_t reg[4];
};

template <class T>
struct WmmaBCol {
  uint32_t reg[4];
};

template <class T>
struct WmmaBRow {
  uint32_t reg[4];
};

struct WmmaAccum {
  float x[8];
};

FC_DEVICE int accum_row(int lane, int i) { return lane / 4 + (i % 4) / 2 * 8; }
FC_DEVICE int accum_col(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8 (PTX ISA: ldmatrix).
FC_DEVICE void ldmatrix_x4(uint32_t (&reg)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
               : "r"(address));
}

FC_DEVICE void ldmatrix_x4_trans(uint32_t (&reg)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
               : "r"(address));
}

// Byte offset of the row that a lane addresses when matrices 0 and 1 lie below each other and 2 and
// 3 to their right; and when 0 and 1 lie side by side and 2 and 3 below them.
FC_DEVICE uint32_t down_then_right(int stride) {
  return uint32_t(lane_idx() % 16 * stride + lane_idx() / 16 * 8) * 2;
}
FC_DEVICE uint32_t right_then_down(int stride) {
  return uint32_t((lane_idx() % 8 + lane_idx() / 16 * 8) * stride + lane_idx() / 8 % 2 * 8) * 2;
}

// wmma.load would give the same registers, but ptxas spends two instructions and a register on the
// address of each; ldmatrix takes one lane address and constants.
template <class T>
FC_DEVICE void wmma_load_a(WmmaA<T>& frag, SmemPtr<T> p, int stride) {
  ldmatrix_x4(frag.reg, p.address + down_then_right(stride));
}

template <class T>
FC_DEVICE void wmma_load_a_col(WmmaA<T>& frag, SmemPtr<T> p, int stride) {
  ldmatrix_x4_trans(frag.reg, p.address + right_then_down(stride));
}

template <class T>
FC_DEVICE void wmma_load_b_col(WmmaBCol<T>& frag, SmemPtr<T> p, int stride) {
  ldmatrix_x4(frag.reg, p.address + right_then_down(stride));
}

template <class T>
FC_DEVICE void wmma_load_b_row(WmmaBRow<T>& frag, SmemPtr<T> p, int stride) {
  ldmatrix_x4_trans(frag.reg, p.address + down_then_right(stride));
}

#define FC_WMMA_MMA_F16(b_layout)                                                                  \
  asm volatile("wmma.mma.sync.aligned.row." b_layout                                               \
               ".m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "                             \
               "{%8, %9, %10, %11, %8, %9, %10, %11}, {%12, %13, %14, %15, %12, %13, %14, %15}, "  \
               "{%0, %1, %2, %3, %4, %5, %6, %7};"                                                 \
               : "+f"(accum.x[0]), "+f"(accum.x[1]), "+f"(accum.x[2]), "+f"(accum.x[3]),           \
                 "+f"(accum.x[4]), "+f"(accum.x[5]), "+f"(accum.x[6]), "+f"(accum.x[7])            \
               : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]),        \
                 "r"(b.reg[1]), "r"(b.reg[2]), "r"(b.reg[3]))

#define FC_WMMA_MMA_BF16(b_layout)                                                                 \
  asm volatile("wmma.mma.sync.aligned.row." b_layout                                               \
               ".m16n16k16.f32.bf16.bf16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "                   \
               "{%8, %9, %10, %11}, {%12, %13, %14, %15}, {%0, %1, %2, %3, %4, %5, %6, %7};"       \
               : "+f"(accum.x[0]), "+f"(accum.x[1]), "+f"(accum.x[2]), "+f"(accum.x[3]),           \
                 "+f"(accum.x[4]), "+f"(accum.x[5]), "+f"(accum.x[6]), "+f"(accum.x[7])            \
               : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]),        \
                 "r"(b.reg[1]), "r"(b.reg[2]), "r"(b.reg[3]))

FC_DEVICE void wmma_mma(WmmaAccum& accum, const WmmaA<float16>& a, const WmmaBCol<float16>& b) {
  FC_WMMA_MMA_F16("col");
}
FC_DEVICE void wmma_mma(WmmaAccum& accum, const WmmaA<float16>& a, const WmmaBRow<float16>& b) {
  FC_WMMA_MMA_F16("row");
}

#if __CUDA_ARCH__ >= 800
FC_DEVICE void wmma_mma(WmmaAccum& accum, const WmmaA<bfloat16>& a, const WmmaBCol<bfloat16>& b) {
  FC_WMMA_MMA_BF16("col");
}
FC_DEVICE void wmma_mma(WmmaAccum& accum, const WmmaA<bfloat16>& a, const WmmaBRow<bfloat16>& b) {
  FC_WMMA_MMA_BF16("row");
}
#endif

FC_DEVICE void wmma_fill(WmmaAccum& accum, float x) {
#pragma unroll
  for (int i = 0; i < 8; ++i) accum.x[i] = x;
}

// The accumulator, rounded to T, as the A operand of the next product. No lane exchanges anything.
template <class T>
FC_DEVICE void wmma_accum_to_a(WmmaA<T>& frag, const WmmaAccum& accum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) frag.reg[i] = pack2<T>(accum.x[2 * i], accum.x[2 * i + 1]);
}
