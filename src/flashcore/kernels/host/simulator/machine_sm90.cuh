// host/simulator/machine_sm90.cuh - what the host side of prims_sm90.cuh asks of the simulator's
// runtime; see host/simulator/machine.cuh. Nothing in this file is seen by a GPU.
#pragma once

#include "host/simulator/machine.cuh"

// The simulator's tensor map: a four-dimensional tensor and the box that one instruction moves:
// rows of one head, or, where box_heads is over 1, of as many heads, one after the other. If it has
// `chunks`, a tensor has five dimensions: `cols` are those of a chunk, and a box has the same rows
// of all chunks, one after the other, and so for each of box_batches batches.
// As large as the opaque one of a GPU; mirrored by the launcher.
struct alignas(64) TensorMap {
  uint64_t base;  // simulated address
  uint64_t row_stride_bytes, head_stride_bytes, batch_stride_bytes;
  uint32_t cols, rows, heads, batches;
  uint32_t box_cols, box_rows, element_bytes, swizzle_bytes;
  uint32_t box_heads, chunks, box_batches;
  uint32_t unused[13];
};
static_assert(sizeof(TensorMap) == 128, "a tensor map has 128 bytes");

namespace fc_host {

// Of a launch that starts early: this thread may touch global memory from now on.
void grid_dependency_wait();
void grid_starts_after_wait();  // but for what the kernel before writes, unless by gmem_await

// mbarriers. An arrival releases what its thread has seen; a wait or a test that succeeds acquires
// it.
void mbar_init(SmemRef bar, int count, Site site);
void mbar_init_fence(Site site);
void mbar_arrive(SmemRef bar, Site site);
void mbar_expect_tx(SmemRef bar, int bytes, Site site);  // without an arrival
bool mbar_test(SmemRef bar, int parity, Site site);
void mbar_wait(SmemRef bar, int parity, Site site);

// TMA: checked when issued, performed at some later moment.
void tma_load(SmemRef dst, const TensorMap& map, SmemRef bar, int col, int row, int chunk, int head,
              int batch, Site site);
void tma_store(const TensorMap& map, SmemRef src, int col, int row, int head, int batch, Site site);
// Of float32; committed as stores. Adds, or replaces.
void bulk_add(uint64_t dst, SmemRef src, int bytes, bool replaces, Site site);
void tma_store_commit(Site site);
void tma_store_wait_read(int pending_groups, Site site);
void tma_store_wait(int pending_groups, Site site);

// Barriers among some warps, register budgets, fences between proxies.
// `op` is one of WarpOp's three; whether `predicate` holds for any thread, with named_barrier_any.
bool named_barrier(WarpOp op, int id, int threads, bool predicate, Site site);
void set_registers(int registers, bool raise, Site site);
void fence_proxy_async(Site site);
void fence_proxy_async_global(Site site);
bool elect_lane(Site site);
void store_matrices(SmemRef row, const uint32_t (&reg)[4], Site site);
void load_matrices(SmemRef row, uint32_t (&reg)[4], bool transposed, Site site);

// An operand of WGMMA: the descriptor's bits, and the view that it was made from.
struct Operand {
  uint32_t low;
  uint32_t high;
  SmemRef view;
};

// One thread's part of a product of its warpgroup.
struct WgmmaIssue {
  float* accum;           // frags * 8 registers
  const uint32_t* a_reg;  // 4 registers, or null: A in shared memory
  Operand a, b;
  int frags;
  bool accumulate;
  bool is_float16;  // else bfloat16
  bool a_along_m;   // in shared memory A is contiguous along m, not along k
  bool b_along_n;   // and B along n
};

void wgmma_issue(const WgmmaIssue& issue, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending_groups, Site site);
void wgmma_hold(const float* accum, int frags, Site site);

}  // namespace fc_host
