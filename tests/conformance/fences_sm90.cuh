// Proxy fences by others than the thread that wrote, and waits by others than the one that reads,
// for the simulator alone. Each case is a mistake, or none. Two warpgroups; `in` and `out` are
// 64 x 64, a box is all of it.
#pragma once

#include "prims_sm90.cuh"

struct FencesParams {
  TensorMap in;
  TensorMap out;
  int32_t number;
};

constexpr int TILE_BYTES = 64 * 128;

struct Fenced {
  SmemPtr<bfloat16> tile;
  SmemPtr<uint64_t> bar, told;
  int me;
};

// Thread 200 writes into a tile that TMA has loaded, and tells who waits for the next phase.
FC_DEVICE void hand_over(const Fenced& s, const TensorMap& in) {
  if (s.me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
  if (s.me == 0) tma_load(s.tile, in, s.bar, 0, 0, 0, 0);
  mbar_wait(s.bar, 0);
  block_sync();  // or the next phase could pass a thread that still waits for the load
  if (s.me == 200) smem_store(s.tile + 3, from_float<bfloat16>(1.0f));  // HANDED OVER
  if (s.me == 200) mbar_arrive(s.bar);
}

FC_DEVICE void await_hand_over(const Fenced& s) { mbar_wait(s.bar, 1); }

// Thread 0 has a copy made.
FC_DEVICE void copies(const Fenced& s, const FencesParams& p) {
  const bool is_between = s.me == 40;
  if (s.me != 0 && !is_between) return;
  switch (p.number) {
    case 0:  // no mistake: it fences behind the wait
      if (is_between) return;
      await_hand_over(s);
      fence_proxy_async();
      break;
    case 1:  // it fences before the wait
      if (is_between) return;
      fence_proxy_async();
      await_hand_over(s);
      break;
    case 2:  // nobody fences
      if (is_between) return;
      await_hand_over(s);
      break;
    case 3:  // no mistake: another thread fences, and hands that on
      if (is_between) await_hand_over(s);
      if (is_between) fence_proxy_async();
      if (is_between) mbar_arrive(s.told);
      mbar_wait(s.told, 0);
      break;
    case 4:  // it has handed on before it fences
      if (is_between) await_hand_over(s);
      if (is_between) mbar_arrive(s.told);
      if (is_between) fence_proxy_async();
      mbar_wait(s.told, 0);
      break;
    case 5:  // no mistake: behind the fence comes a load
    case 6:  // nobody fences before the load
      if (is_between) return;
      await_hand_over(s);
      if (p.number == 5) fence_proxy_async();
      mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // ALARM 6
      mbar_wait(s.bar, 0);
      break;
  }
  if (is_between) return;
  tma_store(p.out, s.tile, 0, 0, 0, 0);  // ALARM 1 ALARM 2 ALARM 4
  tma_store_commit();
  tma_store_wait_read<0>();
}

FC_DEVICE void multiply(const Fenced& s) {
  const WgmmaDesc desc = wgmma_desc<128>(s.tile, 0);
  WmmaAccum d[4];
  for (int i = 0; i < 4; ++i) wmma_fill(d[i], 0.0f);
  wgmma_fence();
  // ALARM 11 ALARM 12 ALARM 13 ALARM 14 ALARM 16 ALARM 21, on the next line
  wgmma_ss<bfloat16>(d, desc, desc, true);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(d);
}

// The first warpgroup multiplies.
FC_DEVICE void products(const Fenced& s, const FencesParams& p) {
  if (warp_idx() >= 4) return;
  if (p.number == 11) fence_proxy_async();
  await_hand_over(s);
  switch (p.number) {
    case 10:  // no mistake: all of its threads fence behind the wait
      fence_proxy_async();
      break;
    case 11:  // they fence before the wait
      break;
    case 12:  // nobody fences
      break;
    case 13:  // three warps fence, the fourth does not
      if (warp_idx() != 2) fence_proxy_async();
      break;
    case 14:  // all lanes but one fence
      if (lane_idx() != 5) fence_proxy_async();
      break;
    case 15:  // no mistake: one warp fences, and a barrier tells the others
      if (warp_idx() == 2) fence_proxy_async();
      named_barrier_sync(1, 128);
      break;
    case 16:  // it fences behind the barrier that would tell the others
      named_barrier_sync(1, 128);
      if (warp_idx() == 2) fence_proxy_async();
      break;
  }
  multiply(s);
}

// The first warpgroup multiplies what TMA loads. Thread 200 alone waits for that, and tells it.
FC_DEVICE void heard(const Fenced& s, const FencesParams& p) {
  if (s.me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
  if (s.me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // LOADED
  if (s.me == 200) {
    switch (p.number) {
      case 20:  // no mistake: it tells behind its wait
        mbar_wait(s.bar, 0);
        mbar_arrive(s.told);
        break;
      case 21:  // it tells before
        mbar_arrive(s.told);
        mbar_wait(s.bar, 0);
        break;
    }
  }
  if (warp_idx() >= 4) return;
  mbar_wait(s.told, 0);
  multiply(s);
}

FC_KERNEL(fences_sm90, 256, 1)(FC_PARAM(FencesParams) p) {
  const auto bars = smem_view<uint64_t>(TILE_BYTES, 2, "bars");
  const Fenced s = {smem_view<bfloat16>(0, 64 * 64, "tile"), bars, bars + 1, thread_idx()};
  if (thread_idx() == 0) {
    mbar_init(s.bar, 1);
    mbar_init(s.told, 1);
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  if (p.number >= 20) {
    heard(s, p);
    return;
  }
  hand_over(s, p.in);
  if (p.number < 10) copies(s, p);
  if (p.number >= 10) products(s, p);
}
