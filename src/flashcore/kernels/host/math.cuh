// host/math.cuh - the float32 functions of ptx/math.cuh, correctly rounded or nearly so, with the
// same treatment of subnormals (.ftz: taken and given as zero). The compiler's names of libm's
// functions: <cmath> takes longer to read than a kernel.
#pragma once

#include "host/types.cuh"

constexpr float NEG_INF = -__builtin_inff();

namespace fc_host {

inline float flush_subnormal(float x) {
  return (bits_of(x) & 0x7f800000u) == 0 ? float_of(bits_of(x) & 0x80000000u) : x;
}

}  // namespace fc_host

FC_DEVICE float exp2_approx(float x) { return fc_host::flush_subnormal(__builtin_exp2f(x)); }
FC_DEVICE float log2_approx(float x) { return __builtin_log2f(fc_host::flush_subnormal(x)); }
FC_DEVICE float rcp_approx(float x) {
  return fc_host::flush_subnormal(1.0f / fc_host::flush_subnormal(x));
}

// a * b + c, rounded once.
FC_DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// The other operand when one is NaN.
FC_DEVICE float max_f(float a, float b) { return a > b || b != b ? a : b; }
FC_DEVICE float abs_f(float x) { return __builtin_fabsf(x); }
FC_DEVICE int min_i(int a, int b) { return a < b ? a : b; }
FC_DEVICE int max_i(int a, int b) { return a > b ? a : b; }

// Four of the eight bytes of low and high, byte i of the result by nibble i of the selector.
template <uint32_t SELECTOR>
FC_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t permuted = 0;
  for (int i = 0; i < 4; ++i) {
    permuted |= uint32_t(bytes >> (SELECTOR >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return permuted;
}

// x, hidden from the optimiser on the device; nothing to hide here.
FC_DEVICE int opaque(int x) { return x; }
