// host/wmma.cuh - 16x16x16 fragments of one warp, with the element map of ptx/wmma.cuh. The lane
// that arrives last gathers the fragments of all lanes, computes, and hands each lane its share.
#pragma once

#include "host/memory.cuh"

namespace fc_host {

// Registers of a fragment that nobody has loaded: NaN in float32, float16 and bfloat16.
constexpr uint32_t POISON = 0x7fa57fa5u;
constexpr float POISON_FLOAT = __builtin_bit_cast(float, POISON);

}  // namespace fc_host

template <class T>
struct WmmaA {
  uint32_t reg[4] = {fc_host::POISON, fc_host::POISON, fc_host::POISON, fc_host::POISON};
};

template <class T>
struct WmmaBCol {
  uint32_t reg[4] = {fc_host::POISON, fc_host::POISON, fc_host::POISON, fc_host::POISON};
};

template <class T>
struct WmmaBRow {
  uint32_t reg[4] = {fc_host::POISON, fc_host::POISON, fc_host::POISON, fc_host::POISON};
};

struct WmmaAccum {
  float x[8] = {fc_host::POISON_FLOAT, fc_host::POISON_FLOAT, fc_host::POISON_FLOAT,
                fc_host::POISON_FLOAT, fc_host::POISON_FLOAT, fc_host::POISON_FLOAT,
                fc_host::POISON_FLOAT, fc_host::POISON_FLOAT};
};

FC_DEVICE int accum_row(int lane, int i) { return lane / 4 + (i % 4) / 2 * 8; }
FC_DEVICE int accum_col(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }

namespace fc_host {

// Element j < 8 of a lane's A fragment is (accum_row, accum_col) of j; of its B fragment it is
// B[k][n] with k = accum_col and n = accum_row, in a register of its own number (PTX ISA:
// mma.m16n8k16, two halves side by side).
inline int register_of_a(int j) { return j / 2; }
inline int register_of_b(int j) { return j / 4 + j / 2 % 2 * 2; }

struct LoadArgument {
  SmemRef ref;
  int stride;
  uint32_t (*reg)[4];
};

// Reads 16 lines of 16 consecutive elements and gives lane l the elements (accum_row(l, j),
// accum_col(l, j)) of them, or the transposed ones.
template <class T>
inline void load_fragment(WarpOp op, uint32_t (&reg)[4], SmemPtr<T> p, int stride, bool transposed,
                          Site site) {
  LoadArgument argument = {p.ref(), stride, &reg};
  const auto register_of = op == WarpOp::wmma_load_b ? register_of_b : register_of_a;
  const uint64_t place = uint64_t(uint32_t(p.base + p.index * int(sizeof(T))));
  const uint64_t uniform = (place << 32) | (uint64_t(uint32_t(stride)) << 1) | uint64_t(transposed);
  if (!warp_arrive(op, &argument, uniform, site)) return;
  // As the CUDA C++ Programming Guide has it (warp matrix functions): a 256-bit aligned pointer and
  // rows 16 bytes apart or a multiple of that, so that padding by 8 elements is allowed.
  if (stride < 16 || stride % 8 != 0) {
    misuse(site, "wmma load: stride %d is not a multiple of 8 elements (16 bytes) of at least 16",
           stride);
  }
  check_alignment(argument.ref, 32, "wmma load", site);
  uint16_t tile[16][16];
  for (int line = 0; line < 16; ++line) {
    SmemRef row = argument.ref;
    row.index += line * stride;
    std::memcpy(tile[line], smem_read_warp(row, 32, site), 32);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& out = *static_cast<LoadArgument*>(warp_argument(lane))->reg;
    for (int j = 0; j < 8; j += 2) {
      const int row = accum_row(lane, j);
      const int col = accum_col(lane, j);
      const uint32_t lo = transposed ? tile[col][row] : tile[row][col];
      const uint32_t hi = transposed ? tile[col + 1][row] : tile[row][col + 1];
      out[register_of(j)] = lo | (hi << 16);
    }
  }
  warp_release();
}

struct MmaArgument {
  float* accum;
  const uint32_t* a;
  const uint32_t* b;
};

template <class T>
inline void multiply_accumulate(WmmaAccum& accum, const uint32_t (&a)[4], const uint32_t (&b)[4],
                                Site site) {
  MmaArgument argument = {accum.x, a, b};
  if (!warp_arrive(WarpOp::wmma_mma, &argument, 0, site)) return;
  float a_full[256];
  float b_full[256];
  float accum_full[256];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<MmaArgument*>(warp_argument(lane));
    for (int j = 0; j < 8; ++j) {
      const int row = accum_row(lane, j);
      const int col = accum_col(lane, j);
      const int shift = j % 2 * 16;
      a_full[row * 16 + col] = to_float(T{uint16_t(part.a[register_of_a(j)] >> shift)});
      b_full[col * 16 + row] = to_float(T{uint16_t(part.b[register_of_b(j)] >> shift)});
      accum_full[row * 16 + col] = part.accum[j];
    }
  }
  multiply_16x16x16(accum_full, a_full, b_full);
  for (int lane = 0; lane < 32; ++lane) {
    float* out = static_cast<MmaArgument*>(warp_argument(lane))->accum;
    for (int j = 0; j < 8; ++j) out[j] = accum_full[accum_row(lane, j) * 16 + accum_col(lane, j)];
  }
  warp_release();
}

}  // namespace fc_host

template <class T>
FC_DEVICE void wmma_load_a(WmmaA<T>& frag, SmemPtr<T> p, int stride, FC_SITE) {
  fc_host::load_fragment(fc_host::WarpOp::wmma_load_a, frag.reg, p, stride, false, FC_HERE);
}

template <class T>
FC_DEVICE void wmma_load_a_col(WmmaA<T>& frag, SmemPtr<T> p, int stride, FC_SITE) {
  fc_host::load_fragment(fc_host::WarpOp::wmma_load_a, frag.reg, p, stride, true, FC_HERE);
}

template <class T>
FC_DEVICE void wmma_load_b_col(WmmaBCol<T>& frag, SmemPtr<T> p, int stride, FC_SITE) {
  fc_host::load_fragment(fc_host::WarpOp::wmma_load_b, frag.reg, p, stride, false, FC_HERE);
}

template <class T>
FC_DEVICE void wmma_load_b_row(WmmaBRow<T>& frag, SmemPtr<T> p, int stride, FC_SITE) {
  fc_host::load_fragment(fc_host::WarpOp::wmma_load_b, frag.reg, p, stride, true, FC_HERE);
}

template <class T>
FC_DEVICE void wmma_mma(WmmaAccum& accum, const WmmaA<T>& a, const WmmaBCol<T>& b, FC_SITE) {
  fc_host::multiply_accumulate<T>(accum, a.reg, b.reg, FC_HERE);
}

template <class T>
FC_DEVICE void wmma_mma(WmmaAccum& accum, const WmmaA<T>& a, const WmmaBRow<T>& b, FC_SITE) {
  fc_host::multiply_accumulate<T>(accum, a.reg, b.reg, FC_HERE);
}

FC_DEVICE void wmma_fill(WmmaAccum& accum, float x) {
  for (float& element : accum.x) element = x;
}

// The accumulator, rounded to T, as the A operand of the next product. No lane exchanges anything.
template <class T>
FC_DEVICE void wmma_accum_to_a(WmmaA<T>& frag, const WmmaAccum& accum) {
  for (int i = 0; i < 4; ++i) frag.reg[i] = pack2<T>(accum.x[2 * i], accum.x[2 * i + 1]);
}
