// host/simulator/entry.cuh - appended after a kernel by the source generator, which defines
// FC_HOST_KERNEL (the kernel) and FC_HOST_PARAMS (its parameter struct). The runtime calls these by
// name.
#pragma once

extern "C" void fc_kernel_entry(const void* params) {
  FC_HOST_KERNEL(*static_cast<const FC_HOST_PARAMS*>(params));
}

extern "C" unsigned long long fc_kernel_params_bytes() { return sizeof(FC_HOST_PARAMS); }

// Returns whether the kernel uses prims_sm90.cuh, for which the runtime must keep more clocks.
#ifdef FC_HOST_SM90
extern "C" int fc_kernel_is_sm90() { return 1; }
#else
extern "C" int fc_kernel_is_sm90() { return 0; }
#endif
