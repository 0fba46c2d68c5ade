// attn_bwd_delta_sm90.cuh - delta of every row before the kernel that computes dQ, dK and dV at
// once (attn_bwd_dkdv_sm90.cuh with ALSO_DQ), and zeros where blocks will count who has added, or,
// unless they are ORDERED, where they will add. A block of one warpgroup takes 64 rows of a head.
#pragma once

#include "prims_sm90.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "bwd_sm90/bwd_delta_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"

static_assert(SMEM_BYTES == VGroup::BYTES + 8, "the plan and the kernel disagree");

FC_KERNEL(attn_bwd_delta_sm90, 128, MIN_BLOCKS)
(FC_PARAM(AttnBwdSm90Params) params) {
  const auto dout = VGroup::view(0, 1, "dout_smem");
  const auto full = smem_view<uint64_t>(VGroup::BYTES, 1, "barriers");
  const AttnParams& p = params.attn;
  // Turns are those of all heads; sums have room for a launch's, and are cleared for each.
  const int first_block = ORDERED ? 0 : params.first_head_q * p.num_m_blocks;
  const BlockCoord block = block_coord(p, first_block + block_idx());
  if (thread_idx() == 0) {
    mbar_init(full, 1);
    mbar_init_fence();
  }
  block_sync();  // orders the initialisation before every use
  grid_dependency_wait();
  if (thread_idx() == 0) {
    mbar_arrive_expect_tx(full, VGroup::BYTES);
    dout.load(0, params.dout_map, full, block.m_begin, block.head_idx, block.batch_idx);
  }
  if (ORDERED && thread_idx() == 0) {
    gmem_store(turns_of(params, block.batch_idx, block.head_idx, block.m_begin), 0);
  }
  if constexpr (!ORDERED) {
    const auto sums = sums_of(params, block.batch_idx, block.head_idx, block.m_begin);
    for (int at = thread_idx() * 4; at < SUMS_OF_GROUP; at += 4 * 128) {
      gmem_store_packet(sums + at, Packet<16>{});
    }
  }
  mbar_wait(full, 0);
  load_row_stats(params, block, dout, block.m_begin, p.seqlen_q);
  grid_launch_dependents();
}
