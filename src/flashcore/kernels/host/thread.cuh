// host/thread.cuh - who am I, and exchange between the lanes of a warp.
#pragma once

#include "host/types.cuh"

FC_DEVICE int thread_idx() { return fc_host::current_thread; }
FC_DEVICE int block_idx() { return fc_host::current_block; }
FC_DEVICE int num_blocks() { return fc_host::num_blocks; }
FC_DEVICE int lane_idx() { return fc_host::current_thread % 32; }
FC_DEVICE int warp_idx() { return fc_host::current_thread / 32; }

// Value of lane `lane_idx() ^ lane_mask`. All 32 lanes must arrive. Orders no memory.
template <class T>  // float or int
FC_DEVICE T shfl_xor(T x, int lane_mask, FC_SITE) {
  // The compiler's own word: <type_traits> takes a twentieth of the time that a kernel does.
  static_assert(__is_same(T, float) || __is_same(T, int), "as on the device");
  struct Exchange {
    T in;
    T out;
  } exchange = {x, x};
  if (lane_mask < 0 || lane_mask > 31) {
    fc_host::misuse(FC_HERE, "shfl_xor: lane_mask %d is outside 0..31", lane_mask);
  }
  if (fc_host::warp_arrive(fc_host::WarpOp::shfl_xor, &exchange, uint64_t(lane_mask), FC_HERE)) {
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<Exchange*>(fc_host::warp_argument(lane ^ lane_mask));
      static_cast<Exchange*>(fc_host::warp_argument(lane))->out = from->in;
    }
    fc_host::warp_release();
  }
  return exchange.out;
}

// x, which all lanes have alike. All 32 lanes must arrive. Orders no memory.
FC_DEVICE int warp_uniform(int x, FC_SITE) {
  if (fc_host::warp_arrive(fc_host::WarpOp::warp_uniform, nullptr, uint64_t(x), FC_HERE)) {
    fc_host::warp_release();
  }
  return x;
}

// True on all lanes when any lane's predicate is. All 32 lanes must arrive. Orders no memory.
FC_DEVICE bool warp_any(bool predicate, FC_SITE) {
  bool vote = predicate;
  if (fc_host::warp_arrive(fc_host::WarpOp::warp_any, &vote, 0, FC_HERE)) {
    const bool any = fc_host::warp_vote();
    for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(fc_host::warp_argument(lane)) = any;
    fc_host::warp_release();
  }
  return vote;
}
