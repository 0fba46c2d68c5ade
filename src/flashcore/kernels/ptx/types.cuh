// ptx/types.cuh - scalar types of the device side. NVRTC compiles without any CUDA or C++ header,
// so the fixed-width names and the two 16-bit storage types are defined here.
#pragma once

using int32_t = int;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

#define FC_DEVICE __device__ __forceinline__
// The second bound makes ptxas keep the register count low enough for `min_blocks` blocks an SM.
#define FC_KERNEL(name, threads, min_blocks) \
  extern "C" __global__ void __launch_bounds__(threads, min_blocks) name

// A parameter that stays in constant memory, where TMA finds its descriptors.
#define FC_PARAM(type) const __grid_constant__ type

// IEEE binary16: storage only, arithmetic is in float32.
struct float16 {
  uint16_t bits;
};

// The upper half of a float32: storage only.
struct bfloat16 {
  uint16_t bits;
};

template <class T>
constexpr bool IS_FLOAT16 = false;
template <>
constexpr bool IS_FLOAT16<float16> = true;

FC_DEVICE float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

FC_DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

FC_DEVICE float to_float(float x) { return x; }

// float32 -> T, round to nearest even.
template <class T>
FC_DEVICE T from_float(float x);

template <>
FC_DEVICE float16 from_float<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <>
FC_DEVICE bfloat16 from_float<bfloat16>(float x) {
  bfloat16 y;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32_t bits = __float_as_uint(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y.bits = is_nan ? 0x7fff : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  return y;
}

template <>
FC_DEVICE float from_float<float>(float x) {
  return x;
}

// Two values of T side by side in one register, `lo` in the lower half.
template <class T>
FC_DEVICE uint32_t pack2(float lo, float hi) {
  return uint32_t(from_float<T>(lo).bits) | (uint32_t(from_float<T>(hi).bits) << 16);
}

#if __CUDA_ARCH__ >= 800
template <>
FC_DEVICE uint32_t pack2<float16>(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

template <>
FC_DEVICE uint32_t pack2<bfloat16>(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
#endif

// Products of two pairs, rounded to T.
template <class T>
FC_DEVICE uint32_t mul2(uint32_t a, uint32_t b);

template <>
FC_DEVICE uint32_t mul2<float16>(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

#if __CUDA_ARCH__ >= 800
template <>
FC_DEVICE uint32_t mul2<bfloat16>(uint32_t a, uint32_t b) {
  uint32_t product;
#if __CUDA_ARCH__ >= 900
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#else
  const uint32_t minus_zeros = 0x80008000u;  // what changes no product, not even one that is 0
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(minus_zeros));
#endif
  return product;
}
#endif

// OCP e4m3: a sign, 4 bits of exponent, 3 of mantissa; no infinity, NaN is 0x7f and 0xff: storage
// only.
struct float8 {
  uint8_t bits;
};

// The four float8 of a register, from the lowest byte on, as pairs of T.
template <class T>
FC_DEVICE void widen4(uint32_t word, uint32_t (&pairs)[2]);

#if __CUDA_ARCH__ >= 890
template <>
FC_DEVICE void widen4<float16>(uint32_t word, uint32_t (&pairs)[2]) {
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}\n"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(word));
}

template <>
FC_DEVICE void widen4<bfloat16>(uint32_t word, uint32_t (&pairs)[2]) {
  widen4<float16>(word, pairs);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float16 low = {uint16_t(pairs[i])};
    const float16 high = {uint16_t(pairs[i] >> 16)};
    pairs[i] = pack2<bfloat16>(to_float(low), to_float(high));
  }
}
#endif

// Two floats as float8 in the lower half of a register, `lo` first: round to nearest even, what is
// too large becomes +-448, a NaN 0x7f. Where NARROWS_FLOAT8 is false there is no such instruction.
constexpr bool NARROWS_FLOAT8 = __CUDA_ARCH__ >= 890;
FC_DEVICE uint32_t narrow2(float lo, float hi) {
  uint16_t pair = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(hi), "f"(lo));
#endif
  return pair;
}
