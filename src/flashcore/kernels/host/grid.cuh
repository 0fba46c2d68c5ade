// host/grid.cuh - kernels that follow each other on a stream. The simulator runs one at a time; in
// a launch that starts early it checks that every thread waits before it touches global memory.
#pragma once

#include "host/simulator/machine_sm90.cuh"
#include "host/types.cuh"

FC_DEVICE void grid_dependency_wait() { fc_host::grid_dependency_wait(); }
FC_DEVICE void grid_starts_after_wait() { fc_host::grid_starts_after_wait(); }
FC_DEVICE void grid_launch_dependents() {}
