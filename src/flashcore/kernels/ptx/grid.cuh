// ptx/grid.cuh - kernels that follow each other on a stream (PTX ISA: griddepcontrol). Both do
// nothing where the launch did not ask for programmatic dependent launch.
#pragma once

// Until the kernels before this one have finished and their writes are visible.
FC_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel's blocks start where there is room; they wait as this one did.
FC_DEVICE void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
