// ptx/math.cuh - float32 functions of the special-function unit (PTX ISA: ex2, lg2, rcp; maximum
// relative error 2^-22 for ex2.approx, 1 ulp for rcp.approx) and exact ones.
#pragma once

#define NEG_INF __int_as_float(0xff800000)

FC_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FC_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FC_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a * b + c, rounded once.
FC_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FC_DEVICE float max_f(float a, float b) { return fmaxf(a, b); }
FC_DEVICE float abs_f(float x) { return fabsf(x); }
FC_DEVICE int min_i(int a, int b) { return a < b ? a : b; }
FC_DEVICE int max_i(int a, int b) { return a > b ? a : b; }

// Four of the eight bytes of low and high, byte i of the result by nibble i of the selector (PTX
// ISA: prmt).
template <uint32_t SELECTOR>
FC_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, SELECTOR);
}

// x, hidden from the optimiser: keeps address arithmetic in a loop from being turned into one
// register a pointer that all live across the loop.
FC_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
