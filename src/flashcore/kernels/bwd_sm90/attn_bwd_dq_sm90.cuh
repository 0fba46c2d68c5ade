// attn_bwd_dq_sm90.cuh - gradient of queries for Hopper, and delta for the kernel of dK and dV,
// which follows; bwd_sm90/bwd_sm90.cuh has the equations. It has the forward's shape
// (attn_fwd_sm90.cuh): a block owns BLOCK_M query rows, 64 a consumer warpgroup, and walks over the
// key tiles that they see:
//
//   S = Q K^T    dP = dO V^T    dQ += dS K
//
// with dS as A operand in registers. With OVERLAPS, dQ of a key tile is issued behind S and dP of
// the next, whose exponentials and dS run beside it.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_varlen.cuh"
#include "tile/sequence.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/mask_tile_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "bwd_sm90/bwd_delta_sm90.cuh"
#include "bwd_sm90/bwd_dq_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"
//@if gate
#include "tile/gates.cuh"
//@end

// A consumer warpgroup's state, carried from key tile to key tile.
struct Consumer {
  int index;
  int slot;      // of Q and dO
  int warp_row;  // first of this warp's 16 query rows
  WmmaAccum dq[QK_FRAGS];
  WmmaAccum scores[KEY_FRAGS];  // then P, times soft-capping's derivative
  WmmaAccum dprobs[KEY_FRAGS];  // then dS
  WmmaA<Element> dscores[KEY_FRAGS];
  RowStats stats;  // of a lane's two rows
  MaskStrip mask;               // of the warp's rows
  uint32_t count;               // of all tiles that came through the stages
//@if gate ds dq
  GateScores gate;
//@end
};

FC_DEVICE void release_k(const Barriers& bar, uint32_t count) {
  arrive_for_warp(bar.k_empty + stage_of<NUM_STAGES>(count));
}

FC_DEVICE void release_v(const Barriers& bar, uint32_t count) {
  arrive_for_warp(bar.v_empty + stage_of<NUM_V_STAGES>(count));
}

FC_DEVICE void await_k(const Barriers& bar, uint32_t count) {
  mbar_wait(bar.k_full + stage_of<NUM_STAGES>(count), parity_of<NUM_STAGES>(count));
}

FC_DEVICE void await_v(const Barriers& bar, uint32_t count) {
  mbar_wait(bar.v_full + stage_of<NUM_V_STAGES>(count), parity_of<NUM_V_STAGES>(count));
}

// Passes over key tiles that only other consumers' rows see.
FC_DEVICE void skip_tiles(Consumer& c, const Barriers& bar, int num_tiles) {
  for (; num_tiles > 0; --num_tiles, ++c.count) {
    await_k(bar, c.count);
    await_v(bar, c.count);
    warp_sync();  // or the next phase could pass a lane that still waits
    release_k(bar, c.count);
    release_v(bar, c.count);
  }
}

// S = Q K^T.
FC_DEVICE void issue_s(Consumer& c, const Buffers& smem, uint32_t count) {
  const WgmmaDesc k_desc = smem.k.over_columns(stage_of<NUM_STAGES>(count));
  wgmma_fence();
  issue_scores<HEAD_DIM, BLOCK_N>(c.scores, smem.q[c.slot].over_columns(), k_desc);
  wgmma_commit();
}

// dP = dO V^T.
FC_DEVICE void issue_dp(Consumer& c, const Buffers& smem, uint32_t count) {
  const WgmmaDesc v_desc = smem.v.over_columns(stage_of<NUM_V_STAGES>(count));
  wgmma_fence();
  issue_scores<HEAD_DIM_V, BLOCK_N>(c.dprobs, smem.dout[c.slot].over_columns(), v_desc);
  wgmma_commit();
}

// dQ += dS K.
FC_DEVICE void issue_dq(Consumer& c, const Buffers& smem, uint32_t count) {
  const WgmmaDesc k_desc = smem.k.over_rows(stage_of<NUM_STAGES>(count));
  wgmma_fence();
  issue_gradient(c.dq, c.dscores, k_desc);
  wgmma_commit();
}

FC_DEVICE void load_own_stats(Consumer& c, const AttnBwdSm90Params& params, int seqlen_q,
                              const BlockCoord& block, const Buffers& smem) {
  c.stats = load_row_stats(params, block, smem.dout[c.slot], block.m_begin + c.index * 64,
                           seqlen_q);
  warp_sync();  // orders reads of dO before its release, and writes of delta before the count
  const int num_rows = min_i(seqlen_q - c.warp_row, 16);
  if (!is_null(params.delta_count) && num_rows > 0 && lane_idx() == 0) {
    gmem_release_add(params.delta_count, num_rows);
  }
}

// S becomes P, times soft-capping's derivative. A mask tensor's part of the tile has been fetched.
template <bool MASKED>
FC_DEVICE void exponentiate(Consumer& c, const AttnParams& p, int key_begin) {
  const VisibleColumns<> visible(p, c.warp_row, key_begin);
  SmemPtr<MaskElement> own = {};
  if constexpr (MASK_KIND != 0) own = c.mask.await(p, c.warp_row);
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
    MaskFragment elements = {};
    if constexpr (MASK_KIND != 0) elements = c.mask.fragment(own, n);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      ScoreMask mask = {true, 0.0f};
      if constexpr (MASK_KIND != 0) mask = as_score_mask(elements.of(i));
      mask.visible &= !MASKED || visible.contain(n, i);
      float& x = c.scores[n].x[i];
      x = probability(x, c.stats.lse_log2[row_of_element(i)], p, mask).times_cap;
    }
  }
  if constexpr (MASK_KIND != 0) {
    warp_sync();  // orders every lane's reads before the next copies
    c.mask.fetch(p, c.warp_row, key_begin / BLOCK_N - 1);
  }
}

// dP becomes dS, still to be multiplied by the scale of the scores.
FC_DEVICE void score_gradient(Consumer& c) {
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = c.dprobs[n].x[i];
      x = c.scores[n].x[i] * (x - c.stats.delta[row_of_element(i)]);
    }
  }
}

// One key tile, the FIRST of a row tile or not; `p` is what its sequence sees. With OVERLAPS, dQ of
// the tile before is issued here, and this one's left to the next. All else that is issued here is
// also waited for: ptxas serialises products that are under way from one turn of a loop to the
// next.
template <bool FIRST>
FC_DEVICE void key_tile(Consumer& c, const AttnBwdSm90Params& params, const AttnParams& p,
                        const Barriers& bar, const Buffers& smem, const BlockCoord& block,
                        int key_begin) {
  constexpr bool HAS_DQ = OVERLAPS && !FIRST;
  await_k(bar, c.count);
  issue_s(c, smem, c.count);
  await_v(bar, c.count);
  issue_dp(c, smem, c.count);
  if (HAS_DQ) issue_dq(c, smem, c.count - 1);
  if (FIRST) load_own_stats(c, params, p.seqlen_q, block, smem);  // beside the products
  wgmma_wait<HAS_DQ ? 2 : 1>();
  wgmma_hold(c.scores);
  if (strip_needs_mask<BLOCK_N>(p, c.warp_row, key_begin)) {
    exponentiate<true>(c, p, key_begin);
  } else {
    exponentiate<false>(c, p, key_begin);
  }
  wgmma_wait<HAS_DQ ? 1 : 0>();
  wgmma_hold(c.dprobs);
  release_v(bar, c.count);
  score_gradient(c);
//@if gate ds dq
  gate_tile<false>(c.dprobs, c.gate, p, c.warp_row, key_begin);
//@end
  if (HAS_DQ) {
    wgmma_wait<0>();
    wgmma_hold(c.dq);
    release_k(bar, c.count - 1);
  }
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) wmma_accum_to_a(c.dscores[n], c.dprobs[n]);
  if (!OVERLAPS) {
    issue_dq(c, smem, c.count);
    wgmma_wait<0>();
    wgmma_hold(c.dq);
    release_k(bar, c.count);
  }
  ++c.count;
}

// dQ of a consumer's 64 rows over key tiles, from last to first.
FC_DEVICE void accumulate(Consumer& c, const AttnBwdSm90Params& params, const AttnParams& p,
                          const Barriers& bar, const Buffers& smem, const BlockCoord& block,
                          const Range& keys) {
  int n_block = keys.end - 1;
  key_tile<true>(c, params, p, bar, smem, block, n_block * BLOCK_N);
  for (--n_block; n_block >= keys.begin; --n_block) {
    key_tile<false>(c, params, p, bar, smem, block, n_block * BLOCK_N);
  }
  if (OVERLAPS) {
    issue_dq(c, smem, c.count - 1);
    wgmma_wait<0>();
    wgmma_hold(c.dq);
    release_k(bar, c.count - 1);
  }
}

// A consumer warpgroup: 64 query rows of every row tile of this block.
FC_DEVICE void consume(const AttnBwdSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  Consumer c;
  c.index = warp_uniform(warp_idx() / 4 - 1);
  c.count = 0;
  for (int turn = 0;; ++turn) {
    c.slot = slot_of(turn, c.index);
    mbar_wait(bar.q_full + c.slot, slot_parity(turn));
    const BlockCoord block = coord_or_end(coord_slot(smem.coords, turn));
    if (block.m_begin == NO_TILE) break;
    const int group_row = block.m_begin + c.index * 64;
    c.warp_row = group_row + warp_idx() % 4 * 16;
    const auto& sequence = sequence_params(p, block);
//@if gate delta
    const Range keys = {0, 0};
//@else
    const Range keys = key_tiles(sequence, block.m_begin);
//@end
    const Range own = IS_BOUNDED ? own_key_tiles<64>(sequence, keys, group_row) : keys;
    if constexpr (MASK_KIND != 0) {
      const int warp = c.index * 4 + warp_idx() % 4;
      c.mask = {mask_of(p, block.batch_idx, block.head_idx), smem.mask + warp * MASK_WARP_ELEMENTS,
                own.begin};
      c.mask.fetch(sequence, c.warp_row, own.end - 1);
    }
//@if gate ds dq
    c.gate = gate_scores_of<false>(p, block, block.head_idx);
//@end
    clear(c.dq);
    if (IS_BOUNDED) skip_tiles(c, bar, keys.end - own.end);
    if (own.begin < own.end) {
      accumulate(c, params, sequence, bar, smem, block, own);
    } else {
      load_own_stats(c, params, sequence.seqlen_q, block, smem);
    }
    if (IS_BOUNDED) skip_tiles(c, bar, own.begin - keys.begin);

    const bool is_empty[2] = {c.stats.lse_log2[0] == POS_INF, c.stats.lse_log2[1] == POS_INF};
    if (warp_any(is_empty[0] || is_empty[1])) {  // whatever arrived there, NaN too
#pragma unroll
      for (int d = 0; d < QK_FRAGS; ++d) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (is_empty[row_of_element(i)]) c.dq[d].x[i] = 0.0f;
        }
      }
    }
    const auto empty = bar.q_empty + c.slot;
    if (HAS_OUT_BUFFER) arrive_for_warp(empty);
    const RowsInTensor rows = {params.dq_map, query_box(p, block), group_row, block.head_idx,
                               !PACKED || group_row < query_rows(p, block.batch_idx).count};
    if (HAS_OUT_BUFFER) {
      store_rows(c.dq, p.softmax_scale, smem.out[c.index], rows, STORE_BARRIER + c.index);
    } else {
      store_in_place(c.dq, p.softmax_scale, smem.q[c.slot], rows, STORE_BARRIER + c.index, empty);
    }
  }
  await_stores();  // shared memory must outlive them
}

FC_KERNEL(attn_bwd_dq_sm90, NUM_WARPS * 32, MIN_BLOCKS)
(FC_PARAM(AttnBwdSm90Params) params) {
  const Buffers smem = {
      QkGroup::view(0, NUM_SLOTS, "q_smem"),
      VGroup::view(DO_OFFSET, NUM_SLOTS, "dout_smem"),
      KTile::view(K_OFFSET, NUM_STAGES, "k_smem"),
      VTile::view(V_OFFSET, NUM_V_STAGES, "v_smem"),
      QkGroup::view(OUT_OFFSET, NUM_OUT_GROUPS, "out_smem"),
      smem_view<MaskElement>(MASK_OFFSET, MASK_ELEMENTS, "mask_smem"),
      smem_view<int32_t>(COORDS_OFFSET, COORD_SLOTS * COORD_INTS, "coords_smem"),
      PACKED ? feed_at(FEED_OFFSET) : Feed(),
  };
  const Barriers bar = barriers();
  if (thread_idx() == 0) {
    tma_prefetch_map(params.q_map);
    tma_prefetch_map(params.dout_map);
    tma_prefetch_map(params.k_map);
    tma_prefetch_map(params.v_map);
    if (PACKED) init_feed(smem.feed);
    init_barriers(bar);
  }
  block_sync();  // orders the initialisation before every use
  grid_dependency_wait();
  if (!is_null(params.delta_count)) grid_launch_dependents();

  if (warp_idx() < 4) {
    lower_registers<PRODUCER_REGISTERS>();
    if (warp_idx() == 0 && elect_lane()) produce(params, bar, smem);
    if (PACKED && warp_idx() == 1) schedule_tiles(params.attn, smem.feed);
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    consume(params, bar, smem);
  }
}
