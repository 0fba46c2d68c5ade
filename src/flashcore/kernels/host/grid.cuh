// host/grid.cuh - kernels that follow each other on a stream.
#pragma once

#include "host/types.cuh"

FC_DEVICE void grid_dependency_wait() {}
FC_DEVICE void grid_launch_dependents() {}
