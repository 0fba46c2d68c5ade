// One mistake a case, for the simulator alone. The line that must be named says `ALARM`, its other
// side `AGAINST`; tests/sim/test_sim_checks.py has the kind of alarm that each must raise.
#pragma once

#include "prims.cuh"

struct FaultsParams {
  GmemPtr<const float> in;       // [4, 16], rows 20 elements apart
  GmemPtr<const uint16_t> half;  // [64]
  GmemPtr<float> out;            // [2, 64]
  GmemPtr<int32_t> counter;      // [1]
  int32_t fault;
};

constexpr int PAD = 24;

FC_DEVICE void fill_tile(SmemPtr<float16> tile) {
  for (int i = thread_idx(); i < 16 * PAD; i += 64) smem_store(tile + i, from_float<float16>(1.0f));
}

FC_KERNEL(faults, 64, 1)(const FaultsParams p) {
  const auto floats = smem_view<float>(0, 64, "floats");
  const auto tile = smem_view<float16>(256, 16 * PAD, "tile");
  const auto halves = smem_view<uint16_t>(1024, 512, "halves");
  const int me = thread_idx();
  const GmemPtr<const uint16_t> nowhere = {};
  WmmaA<float16> a;
  WmmaAccum accum;

  switch (p.fault) {
    // --- races ---
    case 0:  // two warps write one element
      smem_store(floats + lane_idx(), 1.0f);  // ALARM 0 AGAINST 0
      break;
    case 1:  // no barrier between a write and another warp's read
      if (warp_idx() == 0) smem_store(floats + me, 1.0f);  // ALARM 1
      if (warp_idx() == 1) smem_load(floats + lane_idx());  // AGAINST 1
      break;
    case 2:  // a warp barrier does not order another warp
      smem_store(floats + me, 1.0f);  // ALARM 2
      warp_sync();
      smem_load(floats + (63 - me));  // AGAINST 2
      break;
    case 3:  // inside a warp: no barrier at all
      smem_store(floats + me, 1.0f);  // ALARM 3
      smem_load(floats + (me ^ 1));  // AGAINST 3
      break;
    case 4:  // inside a warp: a shuffle orders nothing
      smem_store(floats + me, 1.0f);  // AGAINST 4
      shfl_xor(1.0f, 1);
      smem_load(floats + (me ^ 1));  // ALARM 4
      break;
    case 5:  // a wmma load reads for all lanes
      fill_tile(tile);  // the store is in fill_tile
      if (warp_idx() == 0) wmma_load_a(a, tile, PAD);
      break;
    case 6:  // a write after a wmma load, by a lane that has not met the others since
      fill_tile(tile);
      block_sync();
      if (warp_idx() == 1) break;
      wmma_load_a(a, tile, PAD);  // AGAINST 6
      if (me == 3) smem_store(tile + 5, from_float<float16>(2.0f));  // ALARM 6
      break;
    case 7:  // read, then written by another warp
      smem_store(floats + me, 1.0f);
      block_sync();
      if (warp_idx() == 0) smem_load(floats + 40);  // ALARM 7
      if (warp_idx() == 1 && lane_idx() == 9) smem_store(floats + 40, 2.0f);  // AGAINST 7
      break;
    case 8:  // an atomic and a plain read
      if (me == 0) smem_store(floats, 0.0f);
      block_sync();
      if (me == 0) smem_atomic_add(floats, 1.0f);  // ALARM 8
      if (me == 32) smem_load(floats);  // AGAINST 8
      break;
    case 9:  // atomics of two warps on one float
      if (me == 0) smem_store(floats, 0.0f);
      block_sync();
      if (lane_idx() == 0) smem_atomic_add(floats, 1.0f);  // ALARM 9 AGAINST 9
      break;
    case 39:  // a barrier of one warp says nothing about the other's wmma load
      fill_tile(tile);
      block_sync();
      if (warp_idx() == 0) wmma_load_a(a, tile, PAD);  // ALARM 39
      if (warp_idx() == 1) warp_sync();
      if (me == 40) smem_store(tile + 5, from_float<float16>(2.0f));  // AGAINST 39
      break;
    case 40:  // every lane knows of its own stores, none of all
      if (warp_idx() == 1) break;
      for (int i = me; i < 16 * PAD; i += 32) {
        smem_store(tile + i, from_float<float16>(1.0f));  // AGAINST 40
      }
      wmma_load_a(a, tile, PAD);  // ALARM 40
      break;
    case 41:  // two readers, and a write that is ordered after the first one only
      smem_store(floats + me, 1.0f);
      block_sync();
      if (me == 0) smem_load(floats + 3);
      shfl_xor(1.0f, 1);  // meetings that fix who comes first, and order no memory
      if (me == 2) smem_load(floats + 3);  // AGAINST 41
      shfl_xor(1.0f, 1);
      if (me == 0) smem_store(floats + 3, 2.0f);  // ALARM 41
      break;

    // --- unwritten, out of bounds, misaligned ---
    case 10:
      if (me == 0) smem_load(floats + 7);  // ALARM 10
      break;
    case 11:
      if (me == 63) smem_store(floats + (me + 1), 1.0f);  // ALARM 11
      break;
    case 12:
      if (me == 0) smem_store(floats + (me - 1), 1.0f);  // ALARM 12
      break;
    case 13:
      smem_view<float>(4096 - 4, 2, "too_long");  // ALARM 13
      break;
    case 14:
      if (me == 0) smem_store_packet(halves + 1, Packet<4>{});  // ALARM 14
      break;
    case 15:
      fill_tile(tile);
      block_sync();
      wmma_load_a(a, tile + 8, PAD);  // ALARM 15
      break;
    case 16:
      fill_tile(tile);
      block_sync();
      wmma_load_a(a, tile, 20);  // ALARM 16
      break;
    case 17:  // the last element of the last row is at 3 * 20 + 15
      if (me == 0) gmem_load(p.in + 76);  // ALARM 17
      break;
    case 18:
      if (me == 0) gmem_load(p.in + -1);  // ALARM 18
      break;
    case 19:  // between two rows
      if (me == 0) gmem_load(p.in + 17);  // ALARM 19
      break;
    case 20:
      if (me == 0) gmem_load_packet<4>(nowhere);  // ALARM 20
      break;
    case 21:
      if (me == 0) gmem_load_packet<8>(p.half + 2);  // ALARM 21
      break;

    // --- outputs ---
    case 22:
      if (me == 0) gmem_store(GmemPtr<float>{p.in.address}, 1.0f);  // ALARM 22
      break;
    case 23:  // both blocks write row 0
      gmem_store(p.out + me, 1.0f);  // ALARM 23 AGAINST 23
      break;
    case 24:  // one thread leaves its element out: found when the run is over
      if (me != 5) gmem_store(p.out + (block_idx() * 64 + me), 1.0f);
      break;
    case 25:
      gmem_load(GmemPtr<const float>{p.out.address} + me);  // ALARM 25
      break;

    // --- cp.async ---
    case 26:  // read before the wait
      cp_async<4>(halves + me * 2, p.half, true);  // AGAINST 26
      smem_load(halves + me * 2);  // ALARM 26
      cp_async_commit();
      cp_async_wait<0>();
      break;
    case 27:  // waited for by its own thread, but no barrier before another reads
      cp_async<4>(halves + me * 2, p.half, true);
      cp_async_commit();
      cp_async_wait<0>();  // the copy counts as written here
      smem_load(halves + (me ^ 32) * 2);
      break;
    case 28:  // a group that was not closed is not waited for
      cp_async<4>(halves + me * 2, p.half, true);  // AGAINST 28
      cp_async_wait<0>();
      smem_load(halves + me * 2);  // ALARM 28
      cp_async_commit();
      cp_async_wait<0>();
      break;
    case 29:  // the newest group is still pending
      cp_async<4>(halves + me * 4, p.half, true);
      cp_async_commit();
      cp_async<4>(halves + (me * 4 + 2), p.half, true);  // AGAINST 29
      cp_async_commit();
      cp_async_wait<1>();
      smem_load(halves + me * 4);
      smem_load(halves + (me * 4 + 2));  // ALARM 29
      cp_async_wait<0>();
      break;
    case 30:  // never waited for
      cp_async<4>(halves + me * 2, p.half, true);  // ALARM 30
      cp_async_commit();
      break;
    case 31:  // a source past the end
      cp_async<8>(halves + me * 4, p.half + (me + 1) / 64 * 64, true);  // ALARM 31
      cp_async_commit();
      cp_async_wait<0>();
      break;
    case 32:  // over what another thread reads
      smem_store_packet(halves + me * 2, Packet<4>{});
      block_sync();
      smem_load(halves + (me ^ 32) * 2);  // AGAINST 32
      cp_async<4>(halves + me * 2, p.half, true);  // ALARM 32
      cp_async_commit();
      cp_async_wait<0>();
      break;

    // --- meetings ---
    case 33:  // half a warp multiplies
      if (lane_idx() < 16) wmma_mma(accum, a, WmmaBRow<float16>());  // ALARM 33
      warp_sync();  // AGAINST 33
      break;
    case 34:
      shfl_xor(1.0f, lane_idx() == 7 ? 1 : 2);  // ALARM 34 AGAINST 34
      break;
    case 35:  // barriers of different phases
      if (warp_idx() == 0) block_sync();  // ALARM 35
      if (warp_idx() == 1) block_sync();  // AGAINST 35
      break;
    case 36:
      if (warp_idx() == 1) return;
      block_sync();  // ALARM 36
      break;
    case 37:
      if (lane_idx() == 31) return;
      warp_sync();  // ALARM 37
      break;
    case 38:
      shfl_xor(1.0f, 32);  // ALARM 38
      break;

    case 46:
      warp_uniform(lane_idx() / 31);  // ALARM 46 AGAINST 46
      break;

    // --- counters ---
    case 42:
      gmem_store(p.counter, 1);  // ALARM 42
      break;
    case 43:
      gmem_load(GmemPtr<const int32_t>{p.counter.address});  // ALARM 43
      break;
    case 44:
      gmem_atomic_add(GmemPtr<int32_t>{p.out.address}, 1);  // ALARM 44
      break;
    case 45:
      gmem_atomic_add(p.counter + 1, 1);  // ALARM 45
      break;
  }
}
