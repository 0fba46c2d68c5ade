// abi.h - the structures that sim/run.py passes to fc_sim_run and reads back, mirrored there by
// ctypes.
#pragma once

#include <cstdint>

extern "C" {

// A tensor that the kernel may touch. Its elements live at `data`; the kernel sees them at the
// simulated address `address`, far from those of every other tensor.
struct FcTensor {
  const char* name;
  uint64_t address;
  uint8_t* data;
  int64_t bytes;
  int32_t element_bytes;
  // 0: an input, 1: an output, 2: a counter, for atomics alone, 3: an output that other threads may
  // read, 4: sums that blocks add to, one behind the other, 5: sums that they add to in any order.
  int32_t writable;
  int32_t is_late;  // written by the kernel before, which may run beside this one
  const uint8_t* valid;  // per element of `data`: 1 where the tensor has an element, 0 in a hole
  uint32_t* writer;  // writable: 0, or 1 + block * num_threads + thread of who wrote the element
  uint32_t* writer_site;  // writable: packed site of that write
  int32_t* writer_clock;  // of an output that others may read, and of sums: that thread's clock
};

struct FcLaunch {
  const void* params;
  int32_t grid;         // blocks
  int32_t num_threads;  // of a block
  int32_t smem_bytes;
  int32_t num_tensors;
  const FcTensor* tensors;
  uint64_t seed;
  int32_t starts_early;  // while the kernels before this one may still run
};

struct FcAgent {
  int32_t block;
  int32_t warp;
  int32_t lane;  // -1: all 32 lanes of the warp
  int32_t line;
  char file[128];
};

struct FcReport {
  char kind[32];  // empty when the run was healthy
  char message[1024];
  char array[64];   // shared array or tensor, may be empty
  int64_t element;  // index in the array; for a tensor the offset from its first element
  int32_t tensor;   // index into FcLaunch::tensors, or -1
  int32_t has_other;
  FcAgent agent;       // who raised the alarm
  FcAgent other;       // whom it collided with, if has_other
  char details[8192];  // one line a warp, for a deadlock
  uint64_t switches;   // statistics of the whole run
  uint64_t smem_accesses;
  uint64_t gmem_accesses;
  uint64_t async_copies;
  uint64_t barriers;
  uint64_t warp_ops;
};

}  // extern "C"
