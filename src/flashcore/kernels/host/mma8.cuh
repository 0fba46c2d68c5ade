// host/mma8.cuh - products of one warp with operands B of 8 columns, with the maps of ptx/mma8.cuh.
// The lane that arrives last computes for all.
#pragma once

#include "host/wmma.cuh"

template <class T>
struct MmaB8 {
  uint32_t reg[2] = {fc_host::POISON, fc_host::POISON};
};

namespace fc_host {

template <class T>
inline void multiply_transposed(float* accum, const uint32_t (&a)[4], const uint32_t (&b)[2],
                                uint64_t half, Site site) {
  MmaArgument argument = {accum, a, b};
  if (!warp_arrive(WarpOp::mma8, &argument, half, site)) return;
  float a_full[16][16];
  float b_full[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<MmaArgument*>(warp_argument(lane));
    for (int j = 0; j < 8; ++j) {
      const uint32_t pair = part.a[register_of_a(j)];
      a_full[accum_row(lane, j)][accum_col(lane, j)] = to_float(T{uint16_t(pair >> j % 2 * 16)});
    }
    for (int j = 0; j < 4; ++j) {
      const int k = lane % 4 * 2 + j % 2 + j / 2 * 8;
      b_full[k][lane / 4] = to_float(T{uint16_t(part.b[j / 2] >> j % 2 * 16)});
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* x = static_cast<MmaArgument*>(warp_argument(lane))->accum;
    for (int i = 0; i < 4; ++i) {
      const int m = lane / 4 + i % 2 * 8;
      const int n = lane % 4 * 2 + i / 2;
      for (int k = 0; k < 16; ++k) x[i] += a_full[m][k] * b_full[k][n];
    }
  }
  warp_release();
}

struct TransposeArgument {
  uint32_t given;
  uint32_t result;
};

}  // namespace fc_host

template <int HALF, class T>
FC_DEVICE void mma8_transposed(WmmaAccum& accum, const WmmaA<T>& a, const MmaB8<T>& b, FC_SITE) {
  fc_host::multiply_transposed<T>(accum.x + 4 * HALF, a.reg, b.reg, HALF, FC_HERE);
}

FC_DEVICE uint32_t transpose8x8(uint32_t x, FC_SITE) {
  using namespace fc_host;
  TransposeArgument mine = {x, 0};
  if (warp_arrive(WarpOp::movmatrix, &mine, 0, FC_HERE)) {
    const auto element = [](int r, int c) {
      return static_cast<TransposeArgument*>(warp_argument(r * 4 + c / 2))->given >> c % 2 * 16 &
             0xffffu;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4;
      const int c = lane % 4 * 2;
      static_cast<TransposeArgument*>(warp_argument(lane))->result =
          element(c, r) | element(c + 1, r) << 16;
    }
    warp_release();
  }
  return mine.result;
}
