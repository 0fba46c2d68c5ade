// host/simulator/machine.cuh - what the host primitives ask of the simulator's runtime
// (sim/runtime), which runs one fiber per CUDA thread, one block at a time, in turns where blocks
// wait for each other. Every access passes
// through here, is checked, and raises an alarm that ends the run when it is wrong. Nothing in this
// file is seen by a GPU.
#pragma once

#include <cstdint>
#include <cstring>

// Trailing parameters of every primitive: the kernel line that called it (kept by #line).
#define FC_SITE int line = __builtin_LINE(), const char *file = __builtin_FILE()
#define FC_HERE (fc_host::Site{file, line})

namespace fc_host {

struct Site {
  const char* file;
  int line;
};

// A place in shared memory: element `index` of a named view of `count` elements at byte `base`.
struct SmemRef {
  const char* name;
  int32_t base;
  int32_t count;
  int32_t index;
  int32_t element_bytes;
};

// Operations for which all 32 lanes of a warp meet.
enum class WarpOp : int {
  shfl_xor,
  warp_uniform,
  warp_any,
  warp_sync,
  wmma_load_a,
  wmma_load_b,
  wmma_mma,
  named_barrier_sync,
  named_barrier_arrive,
  named_barrier_any,
  set_registers,
  elect_lane,
  stmatrix,
  ldmatrix,
  mma8,
  movmatrix,
  wgmma,
  wgmma_fence,
  wgmma_commit,
  wgmma_wait
};

// The thread and block that run. The scheduler sets them before it goes on with a fiber.
extern int current_thread;
extern int current_block;
extern int num_blocks;  // of the launch

// Meeting of 32 lanes. True on the lane that arrives last: it computes for all lanes through
// warp_argument(lane) and calls warp_release(). False on the others, once they have been released.
// `uniform` must be the same on all lanes. Orders no memory.
bool warp_arrive(WarpOp op, void* argument, uint64_t uniform, Site site);
void* warp_argument(int lane);
bool warp_vote();  // whether any lane's argument, a bool, is true
void warp_release();

// Barriers: they order memory.
void warp_barrier(Site site);
void block_barrier(Site site);

// Shared memory: checks bounds, alignment, initialisation, pending copies and races of `bytes`
// bytes; returns where they are. smem_read_warp reads on behalf of all 32 lanes of the current
// warp.
void check_view(const char* name, int64_t byte_offset, int64_t count, int element_bytes, Site site);
const void* smem_read(SmemRef ref, int bytes, Site site);
const void* smem_read_warp(SmemRef ref, int bytes, Site site);
void* smem_write(SmemRef ref, int bytes, Site site);
void* smem_atomic(SmemRef ref, int bytes, Site site);
void check_alignment(SmemRef ref, int alignment, const char* what, Site site);

// Global memory by simulated address: the tensor, its bounds, its elements (a stride may leave
// holes), alignment, and that an output element is written once.
const void* gmem_read(uint64_t address, int bytes, Site site);
void* gmem_write(uint64_t address, int bytes, Site site);
// A counter is a tensor apart: atomics only, from any thread.
void* gmem_atomic(uint64_t address, int bytes, Site site);
// Of an atomic by which blocks learn of each other's writes.
void meet_blocks(uint64_t address);
// Of a load by which a block learns of others' writes.
void learn_of_blocks(uint64_t address);
// Of a thread that polls: other blocks may run before it goes on.
void let_blocks_run();
// Of an atomic by which a block makes its writes known, and of a wait until a counter has a value.
void release_to_blocks(uint64_t address);
void await_counter(uint64_t address, int value, Site site);

// cp.async: checked and poisoned at issue, performed later, readable by this thread after the wait.
void async_issue(SmemRef dst, uint64_t src_address, int bytes, bool valid, Site site);
void async_commit(Site site);
void async_wait(int pending_groups, Site site);

// Ends the run: a primitive was called with arguments that the PTX ISA does not allow.
[[noreturn]] void misuse(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// accum += a * b of row-major 16x16 matrices.
void multiply_16x16x16(float* accum, const float* a, const float* b);

}  // namespace fc_host
