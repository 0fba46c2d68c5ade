// append/quantise.cuh - elements of 8-bit caches: x / scale, rounded to nearest even to e4m3 and
// saturated at +-448, bit for bit as PyTorch computes it (problem/scales.py: quantised), but for
// the sign of a NaN.
//
// GPUs from sm_89 on convert two quotients by an instruction, others by integers and one addition,
// some twenty instructions each: few warps append, so that these took longer than the memory.
#pragma once

#include "prims.cuh"

// A scale below this counts as this; mirrored by SMALLEST_SCALE in problem/scales.py. A NaN stays.
constexpr float SMALLEST_DIVISOR = 1e-30f;

// float32 -> e4m3, round to nearest even. Values above 448, inf too, become 448; NaN stays.
FC_DEVICE float8 saturated(float x) {
  const uint32_t bits = to_packet(x).word[0];
  const uint32_t sign = bits >> 24 & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint8_t(sign | 0x7fu)};  // NaN
  if (magnitude > 0x43e00000u) magnitude = 0x43e00000u;         // 448
  if (magnitude < 0x3c800000u) {
    // Below 2^-6 the result is subnormal, in units of 2^-9. Adding 2^14 puts those units at the end
    // of the float's mantissa, so the addition rounds to nearest even.
    const float shifted = from_packet<float>(Packet<4>{{magnitude}}) + 16384.0f;
    return {uint8_t(sign | (to_packet(shifted).word[0] - 0x46800000u))};
  }
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return {uint8_t(sign | (rounded - 0x3c000000u) >> 20)};  // 7 is the bias of e4m3, and 127 float's
}

// A divisor is a scale that many elements are divided by, with its reciprocal.
struct Divisor {
  float value, reciprocal;
};

FC_DEVICE Divisor divisor_of(float scale) {
  const float value = scale < SMALLEST_DIVISOR ? SMALLEST_DIVISOR : scale;
  return {value, 1.0f / value};
}

// Quotients by one division for all x, as each takes ten instructions and a branch. The product
// with the reciprocal, which is rounded, is some units in the last place off; what is left of x
// gives the rest (Markstein, IBM J. Res. Dev. 34, 1990). A product that saturates or becomes 0, and
// inf and NaN, are what they are.
FC_DEVICE float quotient(float x, const Divisor& divisor) {
  const float first = x * divisor.reciprocal;
  const float left = fma_rn(-divisor.value, first, x);
  const float magnitude = abs_f(first);
  const bool is_near = 0x1p-20f < magnitude && magnitude < 1024.0f;
  return is_near ? fma_rn(left, divisor.reciprocal, first) : first;
}

// Two x / divisor as elements, in the lower half of a register.
FC_DEVICE uint32_t quantised2(float x, float y, const Divisor& divisor) {
  const float first = quotient(x, divisor);
  const float second = quotient(y, divisor);
  if (NARROWS_FLOAT8) return narrow2(first, second);
  return uint32_t(saturated(first).bits) | uint32_t(saturated(second).bits) << 8;
}
