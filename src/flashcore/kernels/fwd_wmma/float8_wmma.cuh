// fwd_wmma/float8_wmma.cuh - 8-bit caches: a key tile arrives as bytes, and is widened to Element,
// which has all values of e4m3, whichever of the two it is.
//
// A thread widens the packets that it has copied itself (PacketWalk in tile/copy.cuh), so that they
// are there once its own copies are. Scales do not come into it: K's is part of softmax_scale, V's
// multiplies the output.
#pragma once

#include "prims.cuh"
#include "tile/copy.cuh"

// Pairs of elements whose exponent and mantissa were moved into place are too small by the
// difference of the exponents' biases. Powers of two, as pairs:
template <class T>
constexpr uint32_t BIAS_FACTOR = 0x5c005c00u;  // 2^8 in float16: 15 - 7
template <>
constexpr uint32_t BIAS_FACTOR<bfloat16> = 0x7b807b80u;  // 2^120: 127 - 7

// Two e4m3 in bits 0 to 7 and 16 to 23 as a pair of T, by integers and an exact product: subnormals
// come out right, as the product knows those of T.
template <class T>
FC_DEVICE uint32_t widen2_by_integers(uint32_t apart) {
  constexpr int SHIFT = IS_FLOAT16<T> ? 7 : 4;  // of 10 or 7 bits of mantissa, e4m3 has 3
  const uint32_t magnitude = apart & 0x007f007fu;
  const uint32_t moved = (apart & 0x00800080u) << 8 | magnitude << SHIFT;
  const uint32_t is_nan = (magnitude + 0x00010001u) >> 7 & 0x00010001u;  // 0x7f alone
  return mul2<T>(moved, BIAS_FACTOR<T>) | is_nan * 0x7fffu;
}

// The same as widen4, for GPUs before sm_89.
template <class T>
FC_DEVICE void widen4_by_integers(uint32_t word, uint32_t (&pairs)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t two = word >> 16 * i;
    pairs[i] = widen2_by_integers<T>((two & 0xffu) | (two & 0xff00u) << 8);
  }
}

// Widens this thread's packets of ROWS x COLS bytes. Columns of padding stay as they are.
template <int ROWS, int COLS, int SMEM_STRIDE, class T>
FC_DEVICE void widen_tile(SmemPtr<T> dst_smem, SmemPtr<float8> src_smem) {
  constexpr int WORDS = LOAD_BYTES / 4;
  const PacketWalk<ROWS, COLS, float8> walk;
  const auto src = src_smem + (walk.first_row * COLS + walk.first_col);
  const auto dst = dst_smem + (walk.first_row * SMEM_STRIDE + walk.first_col);
  walk.each([&](int row, int col) {
    const auto bytes = smem_load_packet<LOAD_BYTES>(src + (row * COLS + col));
    const auto to = dst + (row * SMEM_STRIDE + col);
    uint32_t pairs[WORDS][2];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (WIDENS_BY_INTEGERS) {
        widen4_by_integers<T>(bytes.word[i], pairs[i]);
      } else {
        widen4<T>(bytes.word[i], pairs[i]);
      }
    }
    if constexpr (WORDS == 1) {
      smem_store_packet(to, Packet<8>{{pairs[0][0], pairs[0][1]}});
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i += 2) {
        const Packet<16> eight = {{pairs[i][0], pairs[i][1], pairs[i + 1][0], pairs[i + 1][1]}};
        smem_store_packet(to + i * 4, eight);
      }
    }
  });
}
