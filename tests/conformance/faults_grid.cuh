// Accesses to global memory before the kernels ahead have ended, one a case, for the simulator
// alone; see faults.cuh. Wrong only in a launch that starts early. `box_in` and `box_out` are
// 16 x 64, a box is all of it.
#pragma once

#include "prims_sm90.cuh"

struct FaultsGridParams {
  TensorMap box_in, box_out;
  GmemPtr<const float> in;   // [64]
  GmemPtr<float> out;        // [64]
  GmemPtr<int32_t> counter;  // [1]
  int32_t fault;
};

constexpr int TILE_BYTES = 16 * 128;

FC_KERNEL(faults_grid, 64, 1)(FC_PARAM(FaultsGridParams) p) {
  const auto tile = smem_view<uint16_t>(0, 16 * 64, "tile");
  const auto bar = smem_view<uint64_t>(TILE_BYTES, 1, "bar");
  const int me = thread_idx();
  if (me == 0) {
    tma_prefetch_map(p.box_in);  // no access to the tensor
    mbar_init(bar, 1);
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  switch (p.fault) {
    case 0:
      gmem_load(p.in + me);  // ALARM 0
      break;
    case 1:  // behind the first access
      gmem_store(p.out + me, 1.0f);  // ALARM 1
      grid_dependency_wait();
      break;
    case 2:
      gmem_atomic_add(p.counter, 1);  // ALARM 2
      break;
    case 3:  // waited for by another thread
      if (me == 0) grid_dependency_wait();
      block_sync();
      if (me < 2) gmem_load(p.in + me);  // ALARM 3
      break;
    case 4:  // in one of two roles
      if (warp_idx() == 0) grid_dependency_wait();
      gmem_load(p.in + me);  // ALARM 4
      break;
    case 5:
      cp_async<4>(smem_view<float>(0, 64, "floats") + me, p.in + me, true);  // ALARM 5
      cp_async_commit();
      cp_async_wait<0>();
      break;
    case 6:
      if (me == 0) mbar_arrive_expect_tx(bar, TILE_BYTES);
      if (me == 0) tma_load(tile, p.box_in, bar, 0, 0, 0, 0);  // ALARM 6
      mbar_wait(bar, 0);
      break;
    case 7:
      for (int i = me; i < 16 * 64; i += 64) smem_store(tile + i, uint16_t(i));
      fence_proxy_async();
      block_sync();
      if (me == 0) tma_store(p.box_out, tile, 0, 0, 0, 0);  // ALARM 7
      if (me == 0) tma_store_commit();
      if (me == 0) tma_store_wait_read<0>();
      break;
    case 8:  // no mistake
      grid_dependency_wait();
      gmem_store(p.out + me, gmem_load(p.in + me));
      gmem_atomic_add(p.counter, 1);
      grid_launch_dependents();
      break;
  }
}
