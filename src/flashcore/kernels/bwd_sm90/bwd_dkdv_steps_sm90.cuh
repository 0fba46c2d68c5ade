// bwd_sm90/bwd_dkdv_steps_sm90.cuh - the kernel of dK and dV, step by step: waiting for a query
// tile and giving back its buffers, its four products, and what is computed between them.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "bwd_sm90/bwd_dkdv_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"
#include "bwd_sm90/key_mask_sm90.cuh"

// The mask of a warp's 16 keys, of those from `key_row` on that a warpgroup has.
FC_DEVICE KeyMaskStrip mask_strip(const AttnParams& p, const Buffers& smem, int group, int key_row,
                                  int batch_idx, int head_idx) {
  if constexpr (MASK_KIND == 0) {
    return {};
  } else {
    const int warp = warp_idx() % 4;
    return {mask_of(p, batch_idx, head_idx),
            smem.mask + (group * 4 + warp) * KEY_MASK_WARP_ELEMENTS, key_row + warp * 16};
  }
}

// And of the tile's lse and delta.
FC_DEVICE void release_q(const Barriers& bar, uint32_t count) {
  warp_sync();  // orders every lane's reads of those before the arrival
  arrive_for_warp(bar.q_empty + stage_of<NUM_STAGES>(count));
}

FC_DEVICE void release_do(const Barriers& bar, uint32_t count) {
  arrive_for_warp(bar.do_empty + stage_of<NUM_DO_STAGES>(count));
}

// Until all of a tile is there: Q, dO, of which rows that see no key have been cleared, lse, delta.
FC_DEVICE void await_tile(const Barriers& bar, uint32_t count) {
  mbar_wait(bar.tile_full + stage_of<NUM_STAGES>(count), parity_of<NUM_STAGES>(count));
}

FC_DEVICE SmemPtr<float> stats_of(const Buffers& smem, uint32_t count) {
  return smem.stats + stage_of<NUM_STAGES>(count) * STATS_FLOATS;
}

// With dQ stats hold a tile's first row and its head's number in the group, too.
FC_DEVICE int first_row_of(SmemPtr<float> stats) {
  return from_packet<int32_t>(smem_load_packet<4>(stats + 2 * BLOCK_M));
}

FC_DEVICE int head_of(SmemPtr<float> stats) {
  return from_packet<int32_t>(smem_load_packet<4>(stats + (2 * BLOCK_M + 1)));
}

// Until a buffer of dS has room for that of a tile.
FC_DEVICE void await_ds_read(const Barriers& bar, uint32_t count) {
  mbar_wait(bar.ds_empty + stage_of<NUM_DS_STAGES>(count), parity_of<NUM_DS_STAGES>(count) ^ 1);
}

// Hands a consumer's 64 keys of dS^T over to who computes dQ, into a buffer that is free;
// `dscores(n)` are the registers of query fragment n.
template <class Dscores>
FC_DEVICE void hand_over_ds(const Barriers& bar, const Buffers& smem, int group, uint32_t count,
                            const Dscores& dscores) {
  const int stage = stage_of<NUM_DS_STAGES>(count);
  const int lane = opaque(lane_idx());
  const int key = group * 64 + warp_idx() % 4 * 16 + lane % 16;
  const DsTile row = smem.ds.row_of(stage, key);
#pragma unroll
  for (int n = 0; n < QUERY_FRAGS; ++n) {
    stmatrix_x4(row.smem + DsTile::from_row(key, n * 16, lane / 16 * 8), dscores(n).reg);
  }
  warp_sync();  // orders every lane's writes before the arrival
  arrive_for_warp(bar.ds_full + stage);
}

// Passes over tiles that only other consumers' keys are seen by.
FC_DEVICE void skip_tiles(const Barriers& bar, const Buffers& smem, int group, uint32_t& count,
                          int num_tiles) {
  for (; num_tiles > 0; --num_tiles, ++count) {
    await_tile(bar, count);
    if constexpr (DQ_ROLE) {
      WmmaAccum none;
      WmmaA<Element> zeros;
      wmma_fill(none, 0.0f);
      wmma_accum_to_a(zeros, none);
      await_ds_read(bar, count);
      hand_over_ds(bar, smem, group, count, [&](int) { return zeros; });
    }
    release_q(bar, count);  // has a warp_sync(), or the next phase could pass a lane that waits
    release_do(bar, count);
  }
}

// S^T = K Q^T.
FC_DEVICE void issue_s(WmmaAccum (&scores)[QUERY_FRAGS], const Buffers& smem, int group,
                       uint32_t count) {
  // Uniform, or each descriptor is moved from general to uniform registers, two moves a product.
  const int stage = warp_uniform(stage_of<NUM_STAGES>(count));
  wgmma_fence();
  issue_scores<HEAD_DIM, BLOCK_M>(scores, smem.k[group].over_columns(),
                                  smem.q.over_columns() + stage * QTile::BYTES);
  wgmma_commit();
}

// dP^T = V dO^T.
FC_DEVICE void issue_dp(WmmaAccum (&dprobs)[QUERY_FRAGS], const Buffers& smem, int group,
                        uint32_t count) {
  const int stage = warp_uniform(stage_of<NUM_DO_STAGES>(count));
  wgmma_fence();
  issue_scores<HEAD_DIM_V, BLOCK_M>(dprobs, smem.v[group].over_columns(),
                                    smem.dout.over_columns() + stage * DoTile::BYTES);
  wgmma_commit();
}

// dV += P^T dO.
FC_DEVICE void issue_dv(WmmaAccum (&dv)[V_FRAGS], const WmmaA<Element> (&probs)[QUERY_FRAGS],
                        const Buffers& smem, uint32_t count) {
  const int stage = warp_uniform(stage_of<NUM_DO_STAGES>(count));
  wgmma_fence();
  issue_gradient(dv, probs, smem.dout.over_rows() + stage * DoTile::BYTES);
  wgmma_commit();
}

// dK += dS^T Q.
FC_DEVICE void issue_dk(WmmaAccum (&dk)[QK_FRAGS], const WmmaA<Element> (&dscores)[QUERY_FRAGS],
                        const Buffers& smem, uint32_t count) {
  const int stage = warp_uniform(stage_of<NUM_STAGES>(count));
  wgmma_fence();
  issue_gradient(dk, dscores, smem.q.over_rows() + stage * QTile::BYTES);
  wgmma_commit();
}

// A tile's lse or delta: two neighbours of a lane's columns, half of those in fragment n.
struct ColumnsInSmem {
  SmemPtr<float> own;

  FC_DEVICE Packet<8> operator()(int n, int half) const {
    return smem_load_packet<8>(own + (n * 16 + half * 8));
  }
};

FC_DEVICE ColumnsInSmem columns_of(SmemPtr<float> stats) {
  return {stats + opaque(lane_idx()) % 4 * 2};
}

// The same, loaded before they are needed: while WGMMA reads shared memory, a load takes hundreds
// of clocks.
struct ColumnsInRegisters {
  Packet<8> pair[QUERY_FRAGS][2];

  FC_DEVICE Packet<8> operator()(int n, int half) const { return pair[n][half]; }
};

FC_DEVICE ColumnsInRegisters load_columns(SmemPtr<float> stats) {
  const ColumnsInSmem columns = columns_of(stats);
  ColumnsInRegisters loaded;
#pragma unroll
  for (int n = 0; n < QUERY_FRAGS; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) loaded.pair[n][half] = columns(n, half);
  }
  return loaded;
}

// The columns are loaded now if the caller HAS_REGISTERS for them, else when they are needed.
template <bool HAS_REGISTERS>
FC_DEVICE auto columns_ahead(SmemPtr<float> stats) {
  if constexpr (HAS_REGISTERS) {
    return load_columns(stats);
  } else {
    return columns_of(stats);
  }
}

FC_DEVICE float half_of(Packet<8> pair, int i) {
  return from_packet<float>(Packet<4>{{pair.word[i]}});
}

template <bool MASKED, class Columns>
FC_DEVICE void exponentiate_tile(WmmaAccum (&scores)[QUERY_FRAGS],
                                 WmmaA<Element> (&probs)[QUERY_FRAGS],
                                 WmmaA<Element> (&capped_probs)[QUERY_FRAGS], const AttnParams& p,
                                 const Columns& lse, const KeyMaskStrip& strip, int key_row,
                                 int m_begin) {
  const VisibleColumns<true> visible(p, key_row + warp_idx() % 4 * 16, m_begin);
  KeyMaskStrip::Place own = {};
  if constexpr (MASK_KIND != 0) own = strip.await(p, m_begin);
#pragma unroll
  for (int n = 0; n < QUERY_FRAGS; ++n) {
    ScoreMask mask[8];
    MaskElement elements[8];
    if constexpr (MASK_KIND != 0) strip.read(elements, own, n);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      mask[i] = {true, 0.0f};
      if constexpr (MASK_KIND != 0) mask[i] = as_score_mask(elements[i]);
      mask[i].visible &= !MASKED || visible.contain(n, i);
    }
    WmmaAccum prob;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto pair = lse(n, half);
#pragma unroll
      for (int i = half * 4; i < half * 4 + 4; ++i) {
        const auto result = probability(scores[n].x[i], half_of(pair, i % 2), p, mask[i]);
        prob.x[i] = result.p;
        scores[n].x[i] = result.times_cap;
      }
    }
    wmma_accum_to_a(probs[n], prob);
    if (HAS_SOFTCAP && (!KEEPS_P || HAS_ROLES)) wmma_accum_to_a(capped_probs[n], scores[n]);
  }
}

// Scores become log2 of their probabilities. A mask tensor's part of the tile has been fetched.
template <class Columns>
FC_DEVICE void take_log2_probs(WmmaAccum (&scores)[QUERY_FRAGS], const AttnParams& p,
                               const Columns& lse, const KeyMaskStrip& strip, int m_begin) {
  KeyMaskStrip::Place own = {};
  if constexpr (MASK_KIND != 0) own = strip.await(p, m_begin);
#pragma unroll
  for (int n = 0; n < QUERY_FRAGS; ++n) {
    MaskElement elements[8];
    if constexpr (MASK_KIND != 0) strip.read(elements, own, n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto pair = lse(n, half);
#pragma unroll
      for (int i = half * 4; i < half * 4 + 4; ++i) {
        ScoreMask mask = {true, 0.0f};
        if constexpr (MASK_KIND != 0) mask = as_score_mask(elements[i]);
        const float x = log2_probability(scores[n].x[i], half_of(pair, i % 2), p, mask.bias);
        scores[n].x[i] = mask.visible ? x : NEG_INF;
      }
    }
  }
}

// Sets log2 of the probabilities of keys that the window hides to -inf.
FC_DEVICE void hide_keys(WmmaAccum (&log2_probs)[QUERY_FRAGS], const AttnParams& p, int key_row,
                         int m_begin) {
  const VisibleColumns<true> visible(p, key_row + warp_idx() % 4 * 16, m_begin);
#pragma unroll
  for (int n = 0; n < QUERY_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!visible.contain(n, i)) log2_probs[n].x[i] = NEG_INF;
    }
  }
}

// S^T becomes P^T, rounded in `probs`; in `scores`, and where those are not kept rounded in
// `capped_probs`, times soft-capping's derivative. A mask tensor's part of the tile has been
// fetched.
template <class Columns>
FC_DEVICE void exponentiate(WmmaAccum (&scores)[QUERY_FRAGS], WmmaA<Element> (&probs)[QUERY_FRAGS],
                            WmmaA<Element> (&capped_probs)[QUERY_FRAGS], const AttnParams& p,
                            const Columns& lse, const KeyMaskStrip& mask, int key_row,
                            int m_begin) {
  const bool hides = IS_BOUNDED && window_hides_some<BLOCK_M, 64>(p, m_begin, key_row);
  if constexpr (HIDES_APART) {
    take_log2_probs(scores, p, lse, mask, m_begin);
    if (hides) hide_keys(scores, p, key_row, m_begin);
#pragma unroll
    for (int n = 0; n < QUERY_FRAGS; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[n].x[i] = exp2_approx(scores[n].x[i]);
      wmma_accum_to_a(probs[n], scores[n]);
    }
  } else if (hides) {
    exponentiate_tile<true>(scores, probs, capped_probs, p, lse, mask, key_row, m_begin);
  } else {
    exponentiate_tile<false>(scores, probs, capped_probs, p, lse, mask, key_row, m_begin);
  }
}

// Behind `exponentiate`: fetches a mask tensor's part of the tile that begins at a query, if the
// walk has one there.
FC_DEVICE void fetch_next(const KeyMaskStrip& mask, const AttnParams& p, int m_begin,
                          bool is_there) {
  if constexpr (MASK_KIND != 0) {
    warp_sync();  // orders every lane's reads before the next copies
    if (is_there) mask.fetch(p, m_begin);
  }
}

// dS^T, rounded, of dP^T and the rounded P^T: with the difference rounded too, one instruction
// multiplies two elements, where float32 takes four and a register more.
template <class Columns>
FC_DEVICE void score_gradient_by_pairs(WmmaA<Element> (&dscores)[QUERY_FRAGS],
                                       const WmmaAccum (&dprobs)[QUERY_FRAGS],
                                       const WmmaA<Element> (&probs)[QUERY_FRAGS],
                                       const Columns& delta) {
#pragma unroll
  for (int n = 0; n < QUERY_FRAGS; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto pair = delta(n, half);
#pragma unroll
      for (int i = half * 4; i < half * 4 + 4; i += 2) {
        const uint32_t difference = pack2<Element>(dprobs[n].x[i] - half_of(pair, 0),
                                                   dprobs[n].x[i + 1] - half_of(pair, 1));
        dscores[n].reg[i / 2] = mul2<Element>(probs[n].reg[i / 2], difference);
      }
    }
  }
}

// dP^T becomes dS^T, still to be multiplied by the scale of the scores. `prob(n, i)` is P^T's
// element, times soft-capping's derivative.
template <class Columns, class Prob>
FC_DEVICE void score_gradient(WmmaAccum (&dprobs)[QUERY_FRAGS], const Columns& delta,
                              const Prob& prob) {
#pragma unroll
  for (int n = 0; n < QUERY_FRAGS; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto pair = delta(n, half);
#pragma unroll
      for (int i = half * 4; i < half * 4 + 4; ++i) {
        dprobs[n].x[i] = prob(n, i) * (dprobs[n].x[i] - half_of(pair, i % 2));
      }
    }
  }
}
