// A kernel that starts while the one before it may still run: one is added to what that one wrote.
#pragma once

#include "prims_sm90.cuh"

struct DependentsParams {
  GmemPtr<const float> before;  // [blocks, 64]
  GmemPtr<float> after;         // [blocks, 64]
};

FC_KERNEL(dependents, 64, 1)(const DependentsParams p) {
  const int me = block_idx() * 64 + thread_idx();
  grid_launch_dependents();  // before it has done anything
  grid_dependency_wait();
  gmem_store(p.after + me, gmem_load(p.before + me) + 1.0f);
}
