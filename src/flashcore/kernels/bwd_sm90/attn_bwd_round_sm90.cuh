// attn_bwd_round_sm90.cuh - dQ from what the blocks of attn_bwd_dkdv_sm90.cuh added up (ALSO_DQ):
// scaled and rounded. A block of one warpgroup takes 64 rows of a head.
#pragma once

#include "prims_sm90.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "bwd_sm90/bwd_sm90.cuh"

static_assert(SMEM_BYTES == QkGroup::BYTES, "the plan and the kernel disagree");

FC_KERNEL(attn_bwd_round_sm90, NUM_WARPS * 32, MIN_BLOCKS)
(FC_PARAM(AttnBwdSm90Params) params) {
  const auto out = QkGroup::view(0, 1, "out_smem");
  const AttnParams& p = params.attn;
  const BlockCoord block = block_coord(p, params.first_head_q * p.num_m_blocks + block_idx());
  grid_dependency_wait();
  const auto group = sums_of(params, block.batch_idx, block.head_idx, block.m_begin);
  const GmemPtr<const float> sums = {(group + warp_idx() * SUMS_OF_WARP).address};
  // Rows that no key is seen by have no sums, unless sums were cleared before.
  bool has_sums = true;
  if constexpr (ORDERED) {
    const auto turns = turns_of(params, block.batch_idx, block.head_idx, block.m_begin);
    has_sums = gmem_load(GmemPtr<const int32_t>{turns.address}) != 0;
  }
  WmmaAccum dq[QK_FRAGS];
#pragma unroll
  for (int d = 0; d < QK_FRAGS; ++d) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto x = gmem_load_packet<16>(sums + place_of_sums(d, half));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = from_packet<float>(Packet<4>{{x.word[i]}});
        dq[d].x[half * 4 + i] = has_sums ? sum : 0.0f;
      }
    }
  }
  store_rows(dq, p.softmax_scale, out,
             {params.dq_map, {0, block.batch_idx}, block.m_begin, block.head_idx}, 1);
  await_stores();
  grid_launch_dependents();
}
