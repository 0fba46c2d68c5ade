// ptx/grid.cuh - kernels that follow each other on a stream (PTX ISA: griddepcontrol). Both do
// nothing where the launch did not ask for programmatic dependent launch, which is from sm_90 on.
#pragma once

// Until the kernels before this one have finished and their writes are visible.
FC_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Instead, where the kernel before this one let it start only behind its own wait, and what that
// kernel writes is waited for otherwise.
FC_DEVICE void grid_starts_after_wait() {}

// Lets the next kernel's blocks start where there is room; they wait as this one did.
FC_DEVICE void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
