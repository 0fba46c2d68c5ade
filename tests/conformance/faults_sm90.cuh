// One mistake a case with Hopper's primitives, for the simulator alone; see faults.cuh. Two
// warpgroups; `in` and `out` are 64 x 64, a box is all of it.
#pragma once

#include "prims_sm90.cuh"

struct FaultsSm90Params {
  TensorMap in;
  TensorMap tall;  // `in`, said to have more rows than it has
  TensorMap out;
  int32_t fault;
};

constexpr int TILE_BYTES = 64 * 128;

struct Faulty {
  SmemPtr<bfloat16> tile, other, shifted, over;
  SmemPtr<uint64_t> bar, pair, late;
  int me;
};

// A whole tile by TMA, for thread 0; all threads have it afterwards.
FC_DEVICE void load_tile(const Faulty& s, const TensorMap& in) {
  if (s.me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
  if (s.me == 0) tma_load(s.tile, in, s.bar, 0, 0, 0, 0);
  mbar_wait(s.bar, 0);
}

FC_DEVICE void fill(SmemPtr<bfloat16> tile, int me) {
  for (int i = me; i < 64 * 64; i += 256) smem_store(tile + i, from_float<bfloat16>(1.0f));  // FILL
}

FC_DEVICE void barrier_faults(const Faulty& s, const FaultsSm90Params& p) {
  const int me = s.me;
  switch (p.fault) {
    case 0:  // no block_sync between initialisation and use
      if (me == 0) {
        mbar_init(s.late, 1);  // AGAINST 0
        mbar_init_fence();
      }
      if (me == 32) mbar_arrive(s.late);  // ALARM 0
      break;
    case 1:  // initialised while in use
      if (me == 0) mbar_init(s.bar, 1);  // ALARM 1
      break;
    case 2:  // an arrival too many in a phase that waits for bytes
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) mbar_arrive(s.bar);  // ALARM 2
      break;
    case 3:  // more bytes than the count holds
      if (me < 2) mbar_arrive_expect_tx(s.pair, 600000);  // ALARM 3
      break;
    case 4:  // bytes that are not announced
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // ALARM 4
      break;
    case 5:  // too few announced
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES / 2);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // ALARM 5
      break;
    case 6:  // the initialisation was not fenced for TMA
      if (me == 0) mbar_init(s.late, 1);  // AGAINST 6
      block_sync();
      if (me == 32) mbar_arrive_expect_tx(s.late, TILE_BYTES);
      if (me == 32) tma_load(s.tile, p.in, s.late, 0, 0, 0, 0);  // ALARM 6
      break;
    case 7:  // too many announced
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES + 128);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);
      mbar_wait(s.bar, 0);  // ALARM 7
      break;
    case 8:  // one of two arrivals
      if (me == 0) mbar_arrive(s.pair);
      mbar_wait(s.pair, 0);  // ALARM 8
      break;
    case 9:  // no wait
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // AGAINST 9
      if (me == 40) smem_load(s.tile + 7);  // ALARM 9
      mbar_wait(s.bar, 0);
      break;
    case 10:  // the other parity passes at once
      if (me == 0) mbar_arrive_expect_tx(s.pair, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.pair, 0, 0, 0, 0);  // AGAINST 10
      mbar_wait(s.pair, 1);
      if (me == 40) smem_load(s.tile + 7);  // ALARM 10
      break;
    case 11:  // an mbarrier's memory is written
      if (me == 32) smem_store(s.over, bfloat16{});  // ALARM 11
      break;
    case 12:
      mbar_wait(s.bar, 2);  // ALARM 12
      break;
    case 13:  // warps disagree on the count
      if (warp_idx() == 0) named_barrier_sync(1, 64);  // ALARM 13 AGAINST 13
      if (warp_idx() == 1) named_barrier_sync(1, 96);  // ALARM 13 AGAINST 13
      break;
    case 14:  // a warp stands for another one
      if (warp_idx() == 0) named_barrier_arrive(1, 96);  // AGAINST 14
      if (warp_idx() == 0) named_barrier_arrive(1, 96);  // ALARM 14
      break;
    case 15:  // two uses at once
      if (warp_idx() == 0) named_barrier_sync(1, 96);  // ALARM 15 AGAINST 15
      if (warp_idx() == 1) named_barrier_sync(1, 96);  // ALARM 15 AGAINST 15
      break;
    case 16:  // one warp never comes
      if (warp_idx() < 3) named_barrier_sync(1, 128);  // ALARM 16
      break;
    case 17:
      named_barrier_sync(0, 256);  // ALARM 17
      break;
    case 18:  // who only arrives has not seen the others' writes
      if (warp_idx() == 0) smem_store(s.tile + lane_idx(), bfloat16{});  // AGAINST 18
      if (warp_idx() == 0) named_barrier_sync(1, 64);
      if (warp_idx() == 1) named_barrier_arrive(1, 64);
      if (warp_idx() == 1) smem_load(s.tile + lane_idx());  // ALARM 18
      break;
    case 19:  // one warp of a warpgroup
      if (warp_idx() == 5) lower_registers<40>();  // ALARM 19
      break;
    case 20:
      if (warp_idx() < 4) raise_registers<240>();  // AGAINST 20
      if (warp_idx() == 4) raise_registers<240>();  // ALARM 20 AGAINST 20
      if (warp_idx() > 4) raise_registers<232>();  // ALARM 20 AGAINST 20
      break;
    case 21:
      if (lane_idx() < 16) elect_lane();  // ALARM 21
      break;
    case 22:  // two phases pass: who polls the first may not see it
      if (me == 0) mbar_arrive(s.bar);
      if (me == 0) mbar_arrive(s.bar);
      if (me >= 32) mbar_wait(s.bar, 0);  // ALARM 22
      break;
    case 23:  // a vote and a barrier that is none
      if (warp_idx() == 0) named_barrier_any(1, 64, true);  // ALARM 23 AGAINST 23
      if (warp_idx() == 1) named_barrier_sync(1, 64);  // ALARM 23 AGAINST 23
      break;
    case 24:  // told that one arrival is missing, and does not wait for it
      if (me == 0) smem_store(s.tile + 7, bfloat16{});  // ALARM 24 AGAINST 24
      if (me == 0) mbar_arrive(s.pair);
      if (me == 40 && !mbar_test(s.pair, 0)) smem_load(s.tile + 7);  // ALARM 24 AGAINST 24
      break;
    case 25:  // one warp does not vote
      if (warp_idx() < 3) named_barrier_any(1, 128, false);  // ALARM 25
      break;
  }
}

FC_DEVICE void copy_faults(const Faulty& s, const FaultsSm90Params& p) {
  const int me = s.me;
  const uint32_t reg[4] = {1, 2, 3, 4};
  switch (p.fault) {
    case 30:  // written by threads, stored by TMA, no fence
      fill(s.tile, me);  // AGAINST FILL
      block_sync();
      if (me == 0) tma_store(p.out, s.tile, 0, 0, 0, 0);  // ALARM 30
      break;
    case 31:  // only the storing thread fences, before the barrier
      fill(s.tile, me);  // AGAINST FILL
      if (me == 0) fence_proxy_async();
      block_sync();
      if (me == 0) tma_store(p.out, s.tile, 0, 0, 0, 0);  // ALARM 31
      break;
    case 32:  // overwritten while the store may still read
      load_tile(s, p.in);
      if (me == 0) tma_store(p.out, s.tile, 0, 0, 0, 0);  // AGAINST 32
      if (me == 0) tma_store_commit();
      if (me == 0) smem_store(s.tile + 5, bfloat16{});  // ALARM 32
      break;
    case 33:  // left before the store has read
      load_tile(s, p.in);
      if (me == 0) tma_store(p.out, s.tile, 0, 0, 0, 0);  // ALARM 33
      if (me == 0) tma_store_commit();
      break;
    case 34:  // in no group, so not waited for
      load_tile(s, p.in);
      if (me == 0) tma_store(p.out, s.tile, 0, 0, 0, 0);  // ALARM 34
      if (me == 0) tma_store_wait_read<0>();
      break;
    case 35:  // nobody waits for the load
      if (me == 0) mbar_arrive_expect_tx(s.pair, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.pair, 0, 0, 0, 0);  // ALARM 35
      break;
    case 36:  // beyond the end of the shared array
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.other + 64, p.in, s.bar, 0, 0, 0, 0);  // ALARM 36
      break;
    case 37:
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.shifted, p.in, s.bar, 0, 0, 0, 0);  // ALARM 37
      break;
    case 38:  // a load over what threads wrote without a fence
      fill(s.tile, me);  // AGAINST FILL
      block_sync();
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // ALARM 38
      break;
    case 39:  // the map says that there are more rows
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.tall, s.bar, 0, 8, 0, 0);  // ALARM 39
      break;
    case 40:  // two threads store the same box
      load_tile(s, p.in);
      if (me == 0 || me == 9) tma_store(p.out, s.tile, 0, 0, 0, 0);  // ALARM 40 AGAINST 40
      tma_store_commit();
      tma_store_wait_read<0>();
      break;
    case 41:
      load_tile(s, p.in);
      if (me == 0) tma_store(p.in, s.tile, 0, 0, 0, 0);  // ALARM 41
      break;
    case 42:  // a load into a tile that another thread still reads
      load_tile(s, p.in);
      block_sync();
      if (me == 40) smem_load(s.tile + 9);  // AGAINST 42 ALARM 42
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // ALARM 42 AGAINST 42
      break;
    case 43:
      stmatrix_x4(s.tile + (me * 16 + 4), reg);  // ALARM 43
      break;
    case 44:  // two warps store the same rows
      stmatrix_x4(s.tile + lane_idx() * 8, reg);  // ALARM 44 AGAINST 44
      break;
    case 47:  // the newest group has not read yet
      load_tile(s, p.in);
      if (me == 0) tma_store(p.out, s.tile, 0, 64, 0, 0);  // all of it is clipped
      if (me == 0) tma_store_commit();
      if (me == 0) tma_store(p.out, s.tile, 0, 0, 0, 0);  // AGAINST 47
      if (me == 0) tma_store_commit();
      if (me == 0) tma_store_wait_read<1>();
      if (me == 0) smem_store(s.tile + 5, bfloat16{});  // ALARM 47
      break;
    case 48:  // a box that starts inside a unit of 16 bytes
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 5, 0, 0, 0);  // ALARM 48
      break;
    case 46:  // written once more after the fence
      fill(s.tile, me);
      fence_proxy_async();
      smem_store(s.tile + me, bfloat16{});  // AGAINST 46
      block_sync();
      if (me == 0) tma_store(p.out, s.tile, 0, 0, 0, 0);  // ALARM 46
      break;
    case 45:  // the elected lane's wait tells nobody else
      load_tile(s, p.in);
      if (warp_idx() != 0) break;
      if (lane_idx() == 0) tma_store(p.out, s.tile, 0, 0, 0, 0);  // AGAINST 45 ALARM 45
      if (lane_idx() == 0) tma_store_commit();
      if (lane_idx() == 0) tma_store_wait_read<0>();
      if (lane_idx() == 1) smem_store(s.tile + 5, bfloat16{});  // ALARM 45 AGAINST 45
      break;
  }
}

FC_DEVICE void product_faults(const Faulty& s, const FaultsSm90Params& p) {
  const int me = s.me;
  const WgmmaDesc desc = wgmma_desc<128>(s.tile, 0);
  WmmaAccum d[4], e[4];
  WmmaA<bfloat16> a;
  for (int i = 0; i < 4; ++i) {
    wmma_fill(d[i], 0.0f);
    wmma_fill(e[i], 0.0f);
    a.reg[i] = 0;
  }
  if (p.fault < 80) load_tile(s, p.in);
  switch (p.fault) {
    case 60:  // no fence at all
      wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 60
      break;
    case 61:  // used before the wait
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // AGAINST 61
      wgmma_commit();
      wgmma_hold(d);  // ALARM 61
      break;
    case 62:  // written before the wait
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // AGAINST 62
      wgmma_commit();
      d[1].x[3] = 1.0f;
      wgmma_wait<0>();  // ALARM 62
      break;
    case 63:  // the newest group is still pending
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);
      wgmma_commit();
      wgmma_ss<bfloat16>(e, desc, desc, true);  // AGAINST 63
      wgmma_commit();
      wgmma_wait<1>();
      wgmma_hold(d);
      wgmma_hold(e);  // ALARM 63
      break;
    case 64:  // A written before the wait
      wgmma_fence();
      wgmma_rs<bfloat16>(d, a, desc, true);  // AGAINST 64
      wgmma_commit();
      a.reg[2] = 7;
      wgmma_wait<0>();  // ALARM 64
      break;
    case 65:  // not committed
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // AGAINST 65
      wgmma_wait<0>();  // ALARM 65
      break;
    case 66:  // never waited for
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 66
      wgmma_commit();
      break;
    case 67:  // written after the fence
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_fence();
      d[2].x[0] = 4.0f;
      wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 67
      break;
    case 68:  // a second product on registers that were waited for, without a fence
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 68
      break;
    case 69:  // A written after the fence
      wgmma_fence();
      wgmma_rs<bfloat16>(d, a, desc, true);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_fence();
      a.reg[1] = 5;
      wgmma_rs<bfloat16>(d, a, desc, true);  // ALARM 69
      break;
    case 70:  // warps of one warpgroup differ
      wgmma_fence();
      // ALARM 70 AGAINST 70, on the next line
      wgmma_ss<bfloat16>(d, desc, warp_idx() % 4 == 2 ? desc + 32 : desc, true);
      wgmma_commit();
      wgmma_wait<0>();
      break;
    case 71:  // only three warps
      wgmma_fence();
      if (warp_idx() % 4 != 1) {
        wgmma_ss<bfloat16>(d, desc, desc, true);
        wgmma_commit();
        wgmma_wait<0>();  // ALARM 71
      }
      break;
    case 72: {  // past the end of the array
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, wgmma_desc<128>(s.tile + 64 * 8, 0), true);  // ALARM 72
      break;
    }
    case 73:  // inside a swizzle pattern
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc + 128, desc, true);  // ALARM 73
      break;
    case 74:  // 16 columns that leave the row
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc + 112, desc, true);  // ALARM 74
      break;
    case 75:  // overwritten by the other warpgroup
      if (warp_idx() < 4) {
        wgmma_fence();
        wgmma_ss<bfloat16>(d, desc, desc, true);  // AGAINST 75 ALARM 75
        wgmma_commit();
        wgmma_wait<0>();
      }
      if (me == 200) smem_store(s.tile + 3, bfloat16{});  // ALARM 75 AGAINST 75
      break;
    case 76:  // one warp's wait does not tell that the others' products are complete
      if (warp_idx() >= 4) break;
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // AGAINST 76
      wgmma_commit();
      wgmma_wait<0>();
      if (me == 0) smem_store(s.tile + 3, bfloat16{});  // ALARM 76
      break;
    case 77:  // A's registers are a pending product's accumulators
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // AGAINST 77
      wgmma_rs<bfloat16>(e, reinterpret_cast<WmmaA<bfloat16>&>(d[1]), desc, true);  // ALARM 77
      break;
    case 78:  // half a warp
      wgmma_fence();
      if (lane_idx() < 16) wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 78
      break;
    case 79:  // two warpgroups read, the writer knows of one
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // AGAINST 79
      wgmma_commit();
      wgmma_wait<0>();
      if (warp_idx() >= 4) named_barrier_sync(1, 128);
      if (me == 200) smem_store(s.tile + 3, bfloat16{});  // ALARM 79
      break;
    case 84:  // one lane does not wait for the load
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // AGAINST 84
      if (lane_idx() != 5) mbar_wait(s.bar, 0);
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 84
      wgmma_commit();
      wgmma_wait<0>();
      break;
    case 83:  // other registers, written since the only fence
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);
      mbar_wait(s.bar, 0);
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);
      wgmma_commit();
      wgmma_wait<0>();
      e[0].x[0] = d[0].x[0];
      wgmma_ss<bfloat16>(e, desc, desc, true);  // ALARM 83
      break;
    case 80:  // an operand that threads wrote, without a fence
      fill(s.tile, me);  // AGAINST FILL
      block_sync();
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 80
      break;
    case 81:  // without a barrier
      fill(s.tile, me);  // AGAINST FILL
      fence_proxy_async();
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 81
      wgmma_commit();
      wgmma_wait<0>();
      break;
    case 82:  // three warps wait for the load, the fourth does not
      if (me == 0) mbar_arrive_expect_tx(s.bar, TILE_BYTES);
      if (me == 0) tma_load(s.tile, p.in, s.bar, 0, 0, 0, 0);  // AGAINST 82 ALARM 82
      if (warp_idx() % 4 != 3) mbar_wait(s.bar, 0);
      wgmma_fence();
      wgmma_ss<bfloat16>(d, desc, desc, true);  // ALARM 82 AGAINST 82
      wgmma_commit();
      wgmma_wait<0>();
      break;
  }
}

FC_KERNEL(faults_sm90, 256, 1)(FC_PARAM(FaultsSm90Params) p) {
  const auto bars = smem_view<uint64_t>(2 * TILE_BYTES, 3, "bars");
  const Faulty s = {smem_view<bfloat16>(0, 64 * 64, "tile"),
                    smem_view<bfloat16>(TILE_BYTES, 64 * 64, "other"),
                    smem_view<bfloat16>(64, 64 * 64, "shifted"),
                    smem_view<bfloat16>(2 * TILE_BYTES, 4, "over"),
                    bars, bars + 1, bars + 2, thread_idx()};
  if (thread_idx() == 0) {
    mbar_init(s.bar, 1);  // AGAINST 11
    mbar_init(s.pair, 2);
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  if (p.fault < 30) barrier_faults(s, p);
  if (p.fault >= 30 && p.fault < 60) copy_faults(s, p);
  if (p.fault >= 60) product_faults(s, p);
}
