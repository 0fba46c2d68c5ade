// host/types.cuh - scalar types of the simulator side; see ptx/types.cuh for the device side.
#pragma once

#include "host/simulator/machine.cuh"

#define FC_DEVICE inline
#define FC_KERNEL(name, threads, min_blocks) static void name
#define FC_PARAM(type) const type

// IEEE binary16: storage only, arithmetic is in float32.
struct float16 {
  uint16_t bits;
};

// The upper half of a float32: storage only.
struct bfloat16 {
  uint16_t bits;
};

template <class T>
inline constexpr bool IS_FLOAT16 = false;
template <>
inline constexpr bool IS_FLOAT16<float16> = true;

namespace fc_host {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace fc_host

FC_DEVICE float to_float(float16 x) {
  // Exponent and mantissa moved into place are the value times 2^-112, also for subnormals.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) {  // inf or NaN
    return fc_host::float_of(sign | 0x7f800000u | (magnitude & 0x007fffffu));
  }
  return fc_host::float_of(sign | fc_host::bits_of(fc_host::float_of(magnitude) * 0x1p112f));
}

FC_DEVICE float to_float(bfloat16 x) { return fc_host::float_of(uint32_t(x.bits) << 16); }

FC_DEVICE float to_float(float x) { return x; }

// float32 -> T, round to nearest even. NaN becomes 0x7fff, as the GPU's cvt makes it.
template <class T>
FC_DEVICE T from_float(float x);

template <>
FC_DEVICE float16 from_float<float16>(float x) {
  const uint32_t bits = fc_host::bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};  // 2^16 and above: inf
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal, in units of 2^-24. Adding 0.5 puts those units at the
    // end of the float's mantissa, so the addition rounds to nearest even.
    const float shifted = fc_host::float_of(magnitude) + 0.5f;
    return {uint16_t(sign | (fc_host::bits_of(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
  return {uint16_t(sign | ((rounded - 0x38000000u) >> 13))};  // may carry into inf, rightly
}

template <>
FC_DEVICE bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = fc_host::bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
FC_DEVICE float from_float<float>(float x) {
  return x;
}

// Two values of T side by side in one 32-bit word, `lo` in the lower half.
template <class T>
FC_DEVICE uint32_t pack2(float lo, float hi) {
  return uint32_t(from_float<T>(lo).bits) | (uint32_t(from_float<T>(hi).bits) << 16);
}

// Products of two pairs, rounded to T.
template <class T>
FC_DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
  return pack2<T>(to_float(T{uint16_t(a)}) * to_float(T{uint16_t(b)}),
                  to_float(T{uint16_t(a >> 16)}) * to_float(T{uint16_t(b >> 16)}));
}

// OCP e4m3: a sign, 4 bits of exponent, 3 of mantissa; no infinity, NaN is 0x7f and 0xff: storage
// only.
struct float8 {
  uint8_t bits;
};

FC_DEVICE float to_float(float8 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80u) << 24;
  const uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return fc_host::float_of(sign | 0x7fffffffu);
  // Exponent and mantissa moved into place are the value times 2^-120, also for subnormals.
  return fc_host::float_of(sign | fc_host::bits_of(fc_host::float_of(magnitude << 20) * 0x1p120f));
}

// The four float8 of a word, from the lowest byte on, as pairs of T.
template <class T>
FC_DEVICE void widen4(uint32_t word, uint32_t (&pairs)[2]) {
  for (int i = 0; i < 2; ++i) {
    const float8 low = {uint8_t(word >> 16 * i)};
    const float8 high = {uint8_t(word >> (16 * i + 8))};
    pairs[i] = pack2<T>(to_float(low), to_float(high));
  }
}

namespace fc_host {

// The element whose value is nearest: a multiple of the distance of elements of its size.
inline uint32_t float8_of(float x) {
  if (x != x) return 0x7fu;
  const uint32_t sign = bits_of(x) >> 24 & 0x80u;
  const float magnitude = __builtin_fminf(__builtin_fabsf(x), 448.0f);
  const int exponent = magnitude < 0x1p-6f ? -6 : int(bits_of(magnitude) >> 23) - 127;
  const float units = __builtin_nearbyintf(__builtin_ldexpf(magnitude, 3 - exponent));
  return sign | uint32_t((exponent + 7) * 8 + int(units) - 8);
}

}  // namespace fc_host

// Two floats as float8 in the lower half of a register, `lo` first: round to nearest even, what is
// too large becomes +-448, a NaN 0x7f. Kernels are simulated as they are where NARROWS_FLOAT8 is
// false.
constexpr bool NARROWS_FLOAT8 = false;
FC_DEVICE uint32_t narrow2(float lo, float hi) {
  return fc_host::float8_of(lo) | fc_host::float8_of(hi) << 8;
}
