// bwd_dkdv_dq_sm90.cuh - dQ in the kernel of dK and dV, from dS^T of all the block's keys in shared
// memory:
//
//   dQ = dS K
//
// is added, in float32, to what blocks of other keys have for these rows. The order in which they
// come is not fixed, so the last bits of dQ may differ from run to run.
//
// With DQ_ROLE a warpgroup of its own computes it: its products fill the tensor cores while the
// others compute between theirs. Where dK and dV leave no registers for one, two consumers compute
// half of the columns each, a tile later.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "bwd_sm90/bwd_dkdv_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"

// DQ_FRAGS column fragments of dQ of 64 rows: dS^T and K lie with keys as lines.
FC_DEVICE void issue_dq(WmmaAccum (&dq)[DQ_FRAGS], const Buffers& smem, int row_group,
                        int first_frag, uint32_t count) {
  const int stage = warp_uniform(stage_of<NUM_DS_STAGES>(count));
  const WgmmaDesc ds = smem.ds.chunk_over_rows() +
                       (stage * DsTile::BYTES + DsTile::chunk_bytes(row_group));
  const WgmmaDesc k = smem.k.over_rows() + QkGroup::chunk_bytes(first_frag * 16 / CHUNK);
  wgmma_fence();
#pragma unroll
  for (int n = 0; n < BLOCK_N / 16; ++n) {
    wgmma_ss_mn<Element>(dq, ds + DsTile::row_bytes(n * 16),
                         k + (n / 4 * QkGroup::BYTES + QkGroup::row_bytes(n % 4 * 16)), n > 0);
  }
  wgmma_commit();
}

// Adds that to the sums of a head; `row` is the first of the 64, `smem` has a place for each warp,
// which sends its 16 rows on their way by itself. Of its groups of stores all but the newest
// PENDING may lie there still.
template <int PENDING>
FC_DEVICE void add_rows(const WmmaAccum (&dq)[DQ_FRAGS], SmemPtr<float> smem,
                        GmemPtr<float> sums_of_head, int row, int first_frag, int seqlen_q) {
  const auto own = smem + warp_idx() % 4 * DQ_FRAGS * SUMS_OF_FRAG;
  const bool leads = elect_lane();
  if (leads) tma_store_wait_read<PENDING>();  // of what lay here before
  warp_sync();                                // orders that before the writes below
#pragma unroll
  for (int d = 0; d < DQ_FRAGS; ++d) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* x = dq[d].x + half * 4;
      smem_store_packet(own + place_of_sums(d, half),
                        Packet<16>{{to_packet(x[0]).word[0], to_packet(x[1]).word[0],
                                    to_packet(x[2]).word[0], to_packet(x[3]).word[0]}});
    }
  }
  fence_proxy_async();
  warp_sync();  // orders the writes above before they are read
  if (leads) {
    const int place = warp_idx() % 4 * SUMS_OF_WARP + first_frag * SUMS_OF_FRAG;
    const int frags = min_i(QK_FRAGS - first_frag, DQ_FRAGS);
    if (row < seqlen_q) {
      bulk_add(sums_of_head + (int64_t(row / 64) * SUMS_OF_GROUP + place), own,
               frags * SUMS_OF_FRAG * 4);
    }
    tma_store_commit();
  }
}

// --- dQ shared by the consumers ------------------------------------------------------------------

// A consumer's part of dQ, once all of them have handed over dS.
FC_DEVICE void issue_own_dq(WmmaAccum (&dq)[DQ_FRAGS], const Barriers& bar, const Buffers& smem,
                            int index, uint32_t count) {
  mbar_wait(bar.ds_full + stage_of<NUM_DS_STAGES>(count), parity_of<NUM_DS_STAGES>(count));
  issue_dq(dq, smem, 0, index * DQ_FRAGS, count);
}

// --- dQ by a warpgroup of its own ----------------------------------------------------------------

FC_DEVICE void consume_ds(const AttnBwdSm90Params& params, const Barriers& bar,
                          const Buffers& smem) {
  const AttnParams& p = params.attn;
  WmmaAccum dq[DQ_FRAGS];
  uint32_t count = 0;
  for (int turn = 0;; ++turn) {
    BlockCoord block = await_coord(bar, smem, turn);
    if (block.m_begin == NO_TILE) break;
    const Range tiles = query_tiles(p, block.m_begin);
    mbar_wait(bar.kv_full, turn % 2);
    for (int head = 0; head < p.num_heads_q / p.num_heads_kv; ++head, ++block.head_idx) {
      const auto sums = sums_of(params, block.batch_idx, block.head_idx, 0);
      for (int m_block = tiles.begin; m_block < tiles.end; ++m_block, ++count) {
        const int stage = stage_of<NUM_DS_STAGES>(count);
        mbar_wait(bar.ds_full + stage, parity_of<NUM_DS_STAGES>(count));
#pragma unroll
        for (int group = 0; group < ROW_GROUPS; ++group) {
          issue_dq(dq, smem, group, 0, count);
          wgmma_wait<0>();
          wgmma_hold(dq);
          if (group == ROW_GROUPS - 1) arrive_for_warp(bar.ds_empty + stage);
          const int row = m_block * BLOCK_M + group * 64;
          add_rows<ROW_GROUPS - 1>(dq, smem.dq + group * SUMS_OF_GROUP, sums, row, 0, p.seqlen_q);
        }
      }
    }
    warp_sync();  // lanes may still wait for kv_full, whose next phase must not pass them
    arrive_for_warp(bar.kv_empty);
  }
  // Shared memory must outlive the sums that are read from it.
  if (elect_lane()) tma_store_wait_read<0>();
}
