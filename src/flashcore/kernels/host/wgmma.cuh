// host/wgmma.cuh - asynchronous 64 x N x 16 matrix products of a warpgroup (PTX ISA:
// wgmma.mma_async); see ptx/wgmma.cuh. The runtime reads the operands at a moment that the
// scheduler picks; the accumulators hold NaN until the wait.
#pragma once

#include "host/simulator/machine_sm90.cuh"
#include "host/wmma.cuh"

using WgmmaDesc = fc_host::Operand;

template <int ROW_BYTES, class T>
FC_DEVICE WgmmaDesc wgmma_desc(SmemPtr<T> p, int leading_bytes,
                               int pattern_bytes = 8 * ROW_BYTES) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "swizzle patterns of 64 or 128 bytes");
  const auto address = uint32_t(p.base + p.index * int(sizeof(T)));
  const uint32_t swizzle = ROW_BYTES == 128 ? 1 : 2;
  return {(address & 0x3ffff) >> 4 | uint32_t(leading_bytes >> 4) << 16,
          uint32_t(pattern_bytes >> 4) | swizzle << 30, p.ref()};
}

FC_DEVICE WgmmaDesc operator+(WgmmaDesc desc, int bytes) {
  return {desc.low + uint32_t(bytes >> 4), desc.high, desc.view};
}

template <int ROW_BYTES>
FC_DEVICE int swizzled_col(int row, int col) {
  const int unit = ROW_BYTES == 128 ? (col / 8) ^ (row % 8) : (col / 8) ^ (row / 2 % 4);
  return unit * 8;
}

FC_DEVICE void wgmma_fence(FC_SITE) { fc_host::wgmma_fence(FC_HERE); }
FC_DEVICE void wgmma_commit(FC_SITE) { fc_host::wgmma_commit(FC_HERE); }

template <int PENDING>
FC_DEVICE void wgmma_wait(FC_SITE) {
  static_assert(PENDING >= 0, "a number of groups");
  fc_host::wgmma_wait(PENDING, FC_HERE);
}

// Here the accumulators must not be those of a pending product.
template <int FRAGS>
FC_DEVICE void wgmma_hold(WmmaAccum (&d)[FRAGS], FC_SITE) {
  fc_host::wgmma_hold(d[0].x, FRAGS, FC_HERE);
}

template <class T, int FRAGS>
FC_DEVICE void wgmma_hold(WmmaA<T> (&)[FRAGS]) {}

namespace fc_host {

template <class T, bool A_ALONG_M, bool B_ALONG_N, int FRAGS>
void wgmma_issue_as(WmmaAccum (&d)[FRAGS], const uint32_t* a_reg, WgmmaDesc a_desc,
                    WgmmaDesc b_desc, bool accumulate, Site site) {
  static_assert(FRAGS >= 1 && FRAGS <= 16, "N is 16, 32, .. or 256");
  wgmma_issue({d[0].x, a_reg, a_desc, b_desc, FRAGS, accumulate, IS_FLOAT16<T>, A_ALONG_M,
               B_ALONG_N},
              site);
}

}  // namespace fc_host

// d = A B^T (+ d): A 64 x 16 and B N x 16 in shared memory, both contiguous along k.
template <class T, int FRAGS>
FC_DEVICE void wgmma_ss(WmmaAccum (&d)[FRAGS], WgmmaDesc a_desc, WgmmaDesc b_desc, bool accumulate,
                        FC_SITE) {
  fc_host::wgmma_issue_as<T, false, false>(d, nullptr, a_desc, b_desc, accumulate, FC_HERE);
}

// d = A^T B (+ d): A 16 x 64 and B 16 x N in shared memory, contiguous along m and n.
template <class T, int FRAGS>
FC_DEVICE void wgmma_ss_mn(WmmaAccum (&d)[FRAGS], WgmmaDesc a_desc, WgmmaDesc b_desc,
                           bool accumulate, FC_SITE) {
  fc_host::wgmma_issue_as<T, true, true>(d, nullptr, a_desc, b_desc, accumulate, FC_HERE);
}

// d = A B (+ d): A 64 x 16 in registers, B 16 x N in shared memory, contiguous along n.
template <class T, int FRAGS>
FC_DEVICE void wgmma_rs(WmmaAccum (&d)[FRAGS], const WmmaA<T>& a, WgmmaDesc b_desc, bool accumulate,
                        FC_SITE) {
  fc_host::wgmma_issue_as<T, true, true>(d, a.reg, {}, b_desc, accumulate, FC_HERE);
}

// d = A B^T (+ d): A 64 x 16 in registers, B N x 16 in shared memory, contiguous along k.
template <class T, int FRAGS>
FC_DEVICE void wgmma_rs_k(WmmaAccum (&d)[FRAGS], const WmmaA<T>& a, WgmmaDesc b_desc,
                          bool accumulate, FC_SITE) {
  fc_host::wgmma_issue_as<T, false, false>(d, a.reg, {}, b_desc, accumulate, FC_HERE);
}
