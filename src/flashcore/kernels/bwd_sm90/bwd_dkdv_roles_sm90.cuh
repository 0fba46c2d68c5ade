// bwd_sm90/bwd_dkdv_roles_sm90.cuh - dK and dV where one warpgroup's registers cannot hold both of
// 64 keys (head_dim above 128): two warpgroups share the products,
//
//   the first one    S^T = K Q^T    P^T    dV += P^T dO
//   the second one   dP^T = V dO^T  dS^T   dK += dS^T Q
//
// and the first hands P^T, rounded as it is for dV, over to the second, each thread to that which
// has the same elements. While one computes between its products, the other one's are under way.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "bwd_sm90/bwd_dkdv_sm90.cuh"
#include "bwd_sm90/bwd_dkdv_steps_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"
#include "bwd_sm90/key_mask_sm90.cuh"
//@if gate
#include "tile/gates.cuh"
//@end

// Fragments of a thread in the buffer for P^T: packets side by side, thread by thread.
FC_DEVICE SmemPtr<uint32_t> probs_place(const Buffers& smem, int n) {
  return smem.probs + (n * 128 + thread_idx() % 128) * 4;
}

// The first role.
FC_DEVICE void consume_scores(const AttnBwdSm90Params& params, const Barriers& bar,
                              const Buffers& smem) {
  const AttnParams& p = params.attn;
  WmmaAccum dv[V_FRAGS], scores[QUERY_FRAGS];
  WmmaA<Element> probs[QUERY_FRAGS], capped_probs[QUERY_FRAGS];
  uint32_t count = 0;
  for (int turn = 0;; ++turn) {
    const BlockCoord block = await_coord(bar, smem, turn);
    if (block.m_begin == NO_TILE) return;
    const auto& own = own_params(p, block);
    const Range tiles = query_tiles(own, block.m_begin);
    clear(dv);
    mbar_wait(bar.kv_full, turn % 2);
    for (int head = 0; head < p.num_heads_q / p.num_heads_kv; ++head) {
      const KeyMaskStrip mask =
          mask_strip(p, smem, 0, block.m_begin, block.batch_idx, block.head_idx + head);
      if constexpr (MASK_KIND != 0) {
        if (tiles.begin < tiles.end) mask.fetch(own, tiles.begin * BLOCK_M);
      }
      for (int m_block = tiles.begin; m_block < tiles.end; ++m_block, ++count) {
        await_tile(bar, count);
        const ColumnsInRegisters lse = load_columns(stats_of(smem, count));
        issue_s(scores, smem, 0, count);
        wgmma_wait<0>();
        wgmma_hold(scores);
        exponentiate(scores, probs, capped_probs, own, lse, mask, block.m_begin,
                     m_block * BLOCK_M);
        fetch_next(mask, own, (m_block + 1) * BLOCK_M, m_block + 1 < tiles.end);
//@if gate dv
        gate_probs(probs, gate_scores_of<true>(p, block, block.head_idx + head), own,
                   block.m_begin + warp_idx() % 4 * 16, m_block * BLOCK_M);
//@end
        release_q(bar, count);
        mbar_wait(bar.probs_empty, int(count % 2) ^ 1);
#pragma unroll
        for (int n = 0; n < QUERY_FRAGS; ++n) {
          const auto& handed = (HAS_SOFTCAP ? capped_probs : probs)[n].reg;
          smem_store_packet(probs_place(smem, n),
                            Packet<16>{{handed[0], handed[1], handed[2], handed[3]}});
        }
        mbar_arrive(bar.probs_full);
        issue_dv(dv, probs, smem, count);
        wgmma_wait<0>();
        wgmma_hold(dv);
        release_do(bar, count);
      }
    }
    // The other role's last dP^T, which read V, was done when it took the last P^T.
    mbar_wait(bar.probs_empty, int(count % 2) ^ 1);
    clear_behind(dv, own.seqlen_k, block.m_begin);
    store_in_place(dv, 1.0f, smem.v,
                   rows_of_keys(params.dv_map, p, block, block.m_begin, own.seqlen_k),
                   STORE_BARRIER, bar.kv_empty);
  }
}

// The second role.
FC_DEVICE void consume_gradients(const AttnBwdSm90Params& params, const Barriers& bar,
                                 const Buffers& smem) {
  const AttnParams& p = params.attn;
  WmmaAccum dk[QK_FRAGS], dprobs[QUERY_FRAGS];
  WmmaA<Element> dscores[QUERY_FRAGS];
  uint32_t count = 0;
  for (int turn = 0;; ++turn) {
    const BlockCoord block = await_coord(bar, smem, turn);
    if (block.m_begin == NO_TILE) return;
    const auto& own = own_params(p, block);
    const Range tiles = query_tiles(own, block.m_begin);
    clear(dk);
    mbar_wait(bar.kv_full, turn % 2);
    for (int head = 0; head < p.num_heads_q / p.num_heads_kv; ++head) {
      for (int m_block = tiles.begin; m_block < tiles.end; ++m_block, ++count) {
        await_tile(bar, count);
        issue_dp(dprobs, smem, 0, count);
        const ColumnsInRegisters delta = load_columns(stats_of(smem, count) + BLOCK_M);
        mbar_wait(bar.probs_full, int(count % 2));
        Packet<16> probs[QUERY_FRAGS];
#pragma unroll
        for (int n = 0; n < QUERY_FRAGS; ++n) {
          probs[n] = smem_load_packet<16>(probs_place(smem, n));
        }
        wgmma_wait<0>();
        wgmma_hold(dprobs);
        mbar_arrive(bar.probs_empty);
        release_do(bar, count);
        score_gradient(dprobs, delta,
                       [&](int n, int i) { return unpacked(probs[n].word[i / 2], i % 2); });
//@if gate ds dk
        gate_tile<true>(dprobs, gate_scores_of<true>(p, block, block.head_idx + head), own,
                        block.m_begin + warp_idx() % 4 * 16, m_block * BLOCK_M);
//@end
#pragma unroll
        for (int n = 0; n < QUERY_FRAGS; ++n) wmma_accum_to_a(dscores[n], dprobs[n]);
        issue_dk(dk, dscores, smem, count);
        wgmma_wait<0>();
        wgmma_hold(dk);
        release_q(bar, count);
      }
    }
    // The other role's last S^T, which read K, was done when it handed over the last P^T.
    clear_behind(dk, own.seqlen_k, block.m_begin);
    store_in_place(dk, p.softmax_scale, smem.k,
                   rows_of_keys(params.dk_map, p, block, block.m_begin, own.seqlen_k),
                   STORE_BARRIER + 1, bar.kv_empty);
  }
}
