// attn_bwd_dkdv_sm90.cuh - gradients of keys and values for Hopper; bwd_sm90/bwd_sm90.cuh has the
// equations. A block owns BLOCK_N keys, 64 a consumer warpgroup, and walks over the query tiles
// that see some of them, of every query head of the group:
//
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q
//
// Scores lie transposed, rows are keys, so that P^T and dS^T are already where the next product
// wants its A operand, in registers. dK and dV stay in registers too: all heads of a group are
// added up there.
//
// With OVERLAPS, dK of a query tile is issued behind S^T and dP^T of the next: the next
// exponentials run beside these, and dS^T beside dV.
//
// With ALSO_DQ it computes dQ as well: five products, none of them twice. With DQ_ROLE one more
// warpgroup takes dS^T from shared memory and adds dQ of the tile to that of other blocks; else two
// consumers share it, half of the columns each, a tile later (bwd_dkdv_dq_sm90.cuh).
//
// A thread of the producer warpgroup loads by TMA, a warp of it the rows' lse and delta. That warp
// also clears rows of dO that see no key: whatever arrives there, infinity and NaN too, is no
// gradient, and 0 * NaN would spread in the product. Another warp deals out the tiles of packed
// sequences. Blocks are persistent.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_varlen.cuh"
#include "tile/sequence.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "bwd_sm90/bwd_dkdv_dq_sm90.cuh"
#include "bwd_sm90/bwd_dkdv_roles_sm90.cuh"
#include "bwd_sm90/bwd_dkdv_sm90.cuh"
#include "bwd_sm90/bwd_dkdv_steps_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"
#include "bwd_sm90/key_mask_sm90.cuh"
//@if gate
#include "tile/gates.cuh"
//@end

// A consumer warpgroup's state, carried from query tile to query tile.
struct Consumer {
  int index;
  int key_row;                      // first of its 64 keys
//@if gate ds dv dk dq
  BlockCoord block;
  GateScores gate;
//@end
  KeyMaskStrip mask;  // of the warp's keys, for the batch and head
  int batch_idx, first_head;  // with dQ: of the group whose masks come in turns
  WmmaAccum dk[QK_FRAGS], dv[V_FRAGS];
  WmmaAccum scores[QUERY_FRAGS];  // then P^T, times soft-capping's derivative, if it KEEPS_P
  WmmaAccum dprobs[QUERY_FRAGS];  // then dS^T
  WmmaA<Element> probs[QUERY_FRAGS], dscores[QUERY_FRAGS];
  WmmaA<Element> capped_probs[QUERY_FRAGS];  // times that derivative; else `probs` serves
  WmmaAccum dq[DQ_FRAGS];  // if it is shared: a part of that of the tile before
};

// Returns P^T times soft-capping's derivative. Where float32 values would take registers that are
// not there, it is the rounded P^T of dV: dS^T is rounded to the same dtype before it is used.
FC_DEVICE float prob_of(const Consumer& c, int n, int i) {
  if (KEEPS_P) return c.scores[n].x[i];
  return unpacked((HAS_SOFTCAP ? c.capped_probs : c.probs)[n].reg[i / 2], i % 2);
}

// dS^T is 0 for keys behind the last, whose scores may be anything: 0 * infinity would get into dQ.
FC_DEVICE void clear_behind(WmmaA<Element> (&dscores)[QUERY_FRAGS], int num_keys, int first_row) {
  if (first_row + 64 <= num_keys) return;
  // Opaque, or ptxas selects between what is and 0, for all keys.
  const int key = first_row + warp_idx() % 4 * 16 + opaque(lane_idx()) / 4;
#pragma unroll
  for (int n = 0; n < QUERY_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (key + i % 2 * 8 >= num_keys) dscores[n].reg[i] = 0;
    }
  }
}

// dK of a tile has been waited for.
FC_DEVICE void end_dk(Consumer& c, const Barriers& bar, uint32_t count) {
  wgmma_hold(c.dk);
  release_q(bar, count);
}

// dP^T becomes dS^T, in float32 where it is not computed by pairs.
template <class Columns>
FC_DEVICE void differentiate(Consumer& c, const AttnParams& p, const Columns& delta, int m_begin) {
  wgmma_hold(c.dprobs);
  if (!BY_PAIRS) score_gradient(c.dprobs, delta, [&](int n, int i) { return prob_of(c, n, i); });
//@if gate ds dk dq
  gate_tile<true>(c.dprobs, c.gate, p, c.key_row + warp_idx() % 4 * 16, m_begin);
//@end
}

// And then dS^T, rounded.
template <class Columns>
FC_DEVICE void round_gradient(Consumer& c, const AttnParams& p, const Columns& delta) {
  if (BY_PAIRS) {
    score_gradient_by_pairs(c.dscores, c.dprobs, HAS_SOFTCAP ? c.capped_probs : c.probs, delta);
  }
#pragma unroll
  for (int n = 0; !BY_PAIRS && n < QUERY_FRAGS; ++n) wmma_accum_to_a(c.dscores[n], c.dprobs[n]);
  if (ALSO_DQ) clear_behind(c.dscores, p.seqlen_k, c.key_row);
}

// The first row of a query tile that is there; `walked`, where a walk has it.
FC_DEVICE int own_begin(Consumer& c, const AttnParams& p, SmemPtr<float> stats, int walked) {
  if (!ALSO_DQ) return walked;
//@if gate ds dv dk dq
  // The gate's scores are then those of the tile's head.
  c.gate = gate_scores_of<true>(p, c.block, c.block.head_idx + head_of(stats));
//@end
  return first_row_of(stats);
}

// Fetches a mask tensor's part of the next query tile. With dQ that is of the group's next head, or
// of the tile before (walked_tile), which there is from query `end` on; else of the tile behind, if
// that is before `end`.
FC_DEVICE void fetch_next_mask(Consumer& c, const AttnParams& p, SmemPtr<float> stats, int m_begin,
                               int end) {
  if constexpr (MASK_KIND != 0 && ALSO_DQ) {
    const int head = head_of(stats) + 1;
    const bool is_last = head == p.num_heads_q / p.num_heads_kv;
    c.mask.gmem = mask_of(p, c.batch_idx, c.first_head + (is_last ? 0 : head));
    const int next = is_last ? m_begin - BLOCK_M : m_begin;
    fetch_next(c.mask, p, next, next >= end);
  } else {
    fetch_next(c.mask, p, m_begin + BLOCK_M, m_begin + BLOCK_M < end);
  }
}

// In the two functions below a load from shared memory, or a wait at a barrier, stands before the
// next wait for a product, as far as there are registers: beside products either takes up to
// hundreds of clocks. `opaque` hides the first row until then, or ptxas waits for it before it
// issues S^T.

// One query tile. With OVERLAPS, dK of the tile before (unless FIRST) is issued here, and this
// one's left to the next. All else that is issued here is also waited for: ptxas serialises
// products that are under way from one turn of a loop to the next.
template <bool FIRST>
FC_DEVICE void query_tile(Consumer& c, const AttnParams& p, const Barriers& bar,
                          const Buffers& smem, uint32_t count, int m_begin, int end) {
  constexpr bool HAS_DK = OVERLAPS && !FIRST;
  await_tile(bar, count);
  const auto stats = stats_of(smem, count);
  m_begin = own_begin(c, p, stats, m_begin);
  const auto lse = columns_ahead<ALSO_DQ && MASK_KIND == 0 && LSE_AHEAD>(stats);
  issue_s(c.scores, smem, c.index, count);
  if (EARLY_DP) issue_dp(c.dprobs, smem, c.index, count);
  if (HAS_DK) issue_dk(c.dk, c.dscores, smem, count - 1);
  wgmma_wait<int(EARLY_DP) + int(HAS_DK)>();
  wgmma_hold(c.scores);
  if (ALSO_DQ && IS_BOUNDED) m_begin = opaque(m_begin);
  exponentiate(c.scores, c.probs, c.capped_probs, p, lse, c.mask, c.key_row, m_begin);
  fetch_next_mask(c, p, stats, m_begin, end);
  if (HOLDS_PROBS) {
    wgmma_hold(c.probs);
    await_tile(bar, count);  // again, as a barrier to ptxas: else it spills up to 120 bytes
  }
//@if gate dv
  gate_probs(c.probs, c.gate, p, c.key_row + warp_idx() % 4 * 16, m_begin);
//@end
  if (!EARLY_DP) {
    if (HAS_DK) {
      wgmma_wait<0>();
      end_dk(c, bar, count - 1);
    }
    issue_dp(c.dprobs, smem, c.index, count);
  }
  issue_dv(c.dv, c.probs, smem, count);
  const ColumnsInSmem delta = columns_of(stats + BLOCK_M);
  wgmma_wait<EARLY_DP && HAS_DK ? 2 : 1>();
  differentiate(c, p, delta, m_begin);
  if (EARLY_DP && HAS_DK) {  // until then dK reads dS^T of the tile before
    wgmma_wait<1>();
    release_q(bar, count - 1);
  }
  round_gradient(c, p, delta);
  if (!OVERLAPS) issue_dk(c.dk, c.dscores, smem, count);
  if constexpr (ALSO_DQ) {
    await_ds_read(bar, count);
    hand_over_ds(bar, smem, c.index, count, [&](int n) { return c.dscores[n]; });
  }
  wgmma_wait<0>();
  wgmma_hold(c.dv);
  wgmma_hold(c.dk);
  release_do(bar, count);
  if (!OVERLAPS) release_q(bar, count);
}

// A consumer's part of dQ of a tile has been waited for.
FC_DEVICE void end_dq(Consumer& c, const Barriers& bar, uint32_t count) {
  wgmma_hold(c.dq);
  arrive_for_warp(bar.ds_empty + stage_of<NUM_DS_STAGES>(count));
}

// It is handed over to who adds it to what other blocks have.
FC_DEVICE void add_dq(Consumer& c, const Barriers& bar, const Buffers& smem, uint32_t count) {
  hand_over_dq(c.dq, smem, bar, c.index, count);
}

// One query tile with dQ shared. Unless FIRST, dK of the tile before is issued here, and last of
// all its dQ, so that the other consumer has had most of a tile's time to hand over its dS: none
// waits for the other. dQ of the tile before that is added beside S^T.
template <bool FIRST>
FC_DEVICE void shared_tile(Consumer& c, const AttnParams& p, const Barriers& bar,
                           const Buffers& smem, uint32_t count, bool is_second, int turn,
                           int end) {
  await_tile(bar, count);
  const auto stats = stats_of(smem, count);
  int m_begin = own_begin(c, p, stats, 0);
  issue_s(c.scores, smem, c.index, count);
  if (!FIRST) issue_dk(c.dk, c.dscores, smem, count - 1);
  if (!FIRST && !is_second) add_dq(c, bar, smem, count - 2);
  const auto lse = columns_ahead<LSE_AHEAD>(stats);
  wgmma_wait<FIRST ? 0 : 1>();
  wgmma_hold(c.scores);
  if (IS_BOUNDED) m_begin = opaque(m_begin);
  exponentiate(c.scores, c.probs, c.capped_probs, p, lse, c.mask, c.key_row, m_begin);
  fetch_next_mask(c, p, stats, m_begin, end);
  if (FIRST && ENDS_IN_PLACE) mbar_wait(bar.v_full, turn % 2);
//@if gate dv
  gate_probs(c.probs, c.gate, p, c.key_row + warp_idx() % 4 * 16, m_begin);
//@end
  const auto delta = columns_ahead<!HAS_SOFTCAP>(stats + BLOCK_M);
  const auto await_buffers = [&] {
    await_ds_read(bar, count);
    if (!FIRST) await_ds(bar, count - 1);  // ahead of stores of dS, which its fence would wait for
  };
  if (!BY_PAIRS) await_buffers();  // behind dP that would cost 32 bytes of spills
  issue_dp(c.dprobs, smem, c.index, count);
  issue_dv(c.dv, c.probs, smem, count);
  if (BY_PAIRS) await_buffers();
  if (!FIRST) {
    wgmma_wait<2>();
    end_dk(c, bar, count - 1);
  }
  wgmma_wait<1>();
  differentiate(c, p, delta, m_begin);
  round_gradient(c, p, delta);
  hand_over_ds(bar, smem, c.index, count, [&](int n) { return c.dscores[n]; });
  if (FIRST) {
    clear(c.dq);  // the compiler does not know that it will not be added
  } else {
    issue_own_dq(c.dq, smem, c.index, count - 1);
  }
  wgmma_wait<FIRST ? 0 : 1>();
  wgmma_hold(c.dv);
  release_do(bar, count);
  if (!FIRST) {
    wgmma_wait<0>();
    end_dq(c, bar, count - 1);
  }
}

// dK and dV of a consumer's 64 keys over query tiles that lie one behind the other in the stages,
// of one head or, with dQ, of all in the group.
FC_DEVICE void accumulate(Consumer& c, const AttnParams& p, const Barriers& bar,
                          const Buffers& smem, uint32_t& count, const Range& tiles,
                          int num_tiles) {
  const uint32_t end = count + uint32_t(num_tiles);
  int m_begin = walked_tile(tiles, 0) * BLOCK_M;
  const int m_end = (ALSO_DQ ? tiles.begin : tiles.end) * BLOCK_M;
  if constexpr (MASK_KIND != 0) c.mask.fetch(p, m_begin);
  if (OVERLAPS) {
    query_tile<true>(c, p, bar, smem, count, m_begin, m_end);
    ++count;
    m_begin += BLOCK_M;
  }
  for (; count != end; ++count, m_begin += BLOCK_M) {
    query_tile<false>(c, p, bar, smem, count, m_begin, m_end);
  }
  if (OVERLAPS) {
    issue_dk(c.dk, c.dscores, smem, count - 1);
    wgmma_wait<0>();
    end_dk(c, bar, count - 1);
  }
}

// The same with dQ shared, of the block's key tile number `turn`. If it ENDS_IN_PLACE, dQ of the
// last tile stays in registers: dK and dV shall not wait for a turn to add.
FC_DEVICE void accumulate_shared(Consumer& c, const AttnParams& p, const Barriers& bar,
                                 const Buffers& smem, uint32_t& count, const Range& tiles,
                                 int num_tiles, int turn) {
  const uint32_t first = count;
  const uint32_t end = count + uint32_t(num_tiles);
  const int m_end = tiles.begin * BLOCK_M;
  if constexpr (MASK_KIND != 0) c.mask.fetch(p, walked_tile(tiles, 0) * BLOCK_M);
  shared_tile<true>(c, p, bar, smem, count, false, turn, m_end);
  ++count;
  for (; count != end; ++count) {
    shared_tile<false>(c, p, bar, smem, count, count - first == 1, turn, m_end);
  }
  issue_dk(c.dk, c.dscores, smem, count - 1);
  if (num_tiles > 1) add_dq(c, bar, smem, count - 2);
  await_ds(bar, count - 1);
  issue_own_dq(c.dq, smem, c.index, count - 1);
  wgmma_wait<0>();
  end_dk(c, bar, count - 1);
  end_dq(c, bar, count - 1);
  if (!ENDS_IN_PLACE) add_dq(c, bar, smem, count - 1);
}

// dK and dV with dQ shared go where dS and V lay, so that neither waits for the other; K of the
// next tile arrives meanwhile. Behind them dQ of the last tile is handed over, if there is one;
// `count` tiles were walked over.
FC_DEVICE void store_in_places(Consumer& c, const AttnBwdSm90Params& params, const Barriers& bar,
                            const Buffers& smem, const BlockCoord& block, uint32_t count,
                            bool has_tiles, int turn) {
  const AttnParams& p = params.attn;
  const int barrier = STORE_BARRIER + c.index;
  if (!has_tiles) mbar_wait(bar.v_full, turn % 2);  // who computed has waited
  store_rows(c.dv, 1.0f, smem.v[c.index],
             rows_of_keys(params.dv_map, p, block, c.key_row, 0), barrier);
  for (int i = 0; i < NUM_DS_STAGES; ++i) await_ds_read(bar, count + i);
  store_rows<1>(c.dk, p.softmax_scale, DkInDs{smem.ds.row_of(0, c.index * 64).smem},
                rows_of_keys(params.dk_map, p, block, c.key_row, 0), barrier);
  tma_store_wait_read<1>();  // dV, by the thread that stored it; a branch would spill
  warp_sync();  // lanes may still wait for v_full, whose next phase must not pass them
  arrive_for_warp(bar.v_empty);
  if (has_tiles) add_dq(c, bar, smem, count - 1);
}

// A consumer warpgroup: 64 keys of every key tile of this block.
FC_DEVICE void consume(const AttnBwdSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  Consumer c;
  c.index = warp_uniform(warp_idx() / 4 - 1);
  uint32_t count = 0;
  for (int turn = 0;; ++turn) {
    const BlockCoord block = await_coord(bar, smem, turn);
    if (block.m_begin == NO_TILE) break;
    c.key_row = block.m_begin + c.index * 64;
    const auto& sequence = own_params(p, block);
    const Range tiles = query_tiles(sequence, block.m_begin);
    // A consumer that shares dQ computes its part of it for all query tiles.
    const Range own = DQ_SHARED ? tiles : own_query_tiles<64>(sequence, tiles, c.key_row);
    clear(c.dk);
    clear(c.dv);
    mbar_wait(bar.kv_full, turn % 2);
    if (DQ_SHARED) {  // dQ or dS may lie where dK lay, says who sent that
      await_stores();
      named_barrier_sync(STORE_BARRIER + c.index, 128);
    }
    const int heads_per_kv = opaque(p.num_heads_q) / p.num_heads_kv;  // for one register less
    // The walks over one head's tiles each, or one over those of all heads of the group. Opaque, or
    // ptxas spills 72 to 144 bytes where consumers share dQ; counted down, as a head's number would
    // take one more register.
    const int num_walks = ALSO_DQ ? opaque(1) : heads_per_kv;
    const int heads = ALSO_DQ ? heads_per_kv : 1;
    for (int left = num_walks; left > 0; --left) {
      const int head = num_walks - left;
      c.mask = mask_strip(p, smem, c.index, c.key_row, block.batch_idx, block.head_idx + head);
      c.batch_idx = block.batch_idx;
      c.first_head = block.head_idx;
//@if gate ds dv dk dq
      c.block = block;
      c.gate = gate_scores_of<true>(p, block, block.head_idx + head);
//@end
      const int before = heads * (own.begin - tiles.begin);
      const int behind = heads * (tiles.end - own.end);
      skip_tiles(bar, smem, c.index, count, ALSO_DQ ? behind : before);
      if (own.begin < own.end) {
        const int num_tiles = heads * (own.end - own.begin);
        if constexpr (DQ_SHARED) {
          accumulate_shared(c, sequence, bar, smem, count, own, num_tiles, turn);
        } else {
          accumulate(c, sequence, bar, smem, count, own, num_tiles);
        }
      }
      skip_tiles(bar, smem, c.index, count, ALSO_DQ ? before : behind);
    }
    warp_sync();  // lanes may still wait for kv_full, whose next phase must not pass them
    arrive_for_warp(bar.kv_empty);
    if constexpr (ENDS_IN_PLACE) {
      store_in_places(c, params, bar, smem, block, count, own.begin < own.end, turn);
      continue;
    }
    // Read again, as a register that held it all along would be one too many.
    const int num_keys = VARLEN != 0 ? own_params(p, block).seqlen_k : 0;
    clear_behind(c.dv, num_keys, c.key_row);
    clear_behind(c.dk, num_keys, c.key_row);
    const OutGroup out = smem.out[c.index];
    if (DQ_SHARED) await_dq_read(bar, c.index, count);  // it lay there
    store_rows(c.dv, 1.0f, out.as<VGroup>(),
               rows_of_keys(params.dv_map, p, block, c.key_row, num_keys),
               STORE_BARRIER + c.index);
    store_rows(c.dk, p.softmax_scale, out.as<QkGroup>(),
               rows_of_keys(params.dk_map, p, block, c.key_row, num_keys),
               STORE_BARRIER + c.index);
  }
  await_stores();  // shared memory must outlive them
}

FC_KERNEL(attn_bwd_dkdv_sm90, NUM_WARPS * 32, MIN_BLOCKS)
(FC_PARAM(AttnBwdSm90Params) params) {
  // Not by SmemTile::view: behind one more call ptxas takes other registers for addresses.
  const Buffers smem = {
      {smem_view<Element>(0, NUM_KEY_GROUPS * QkGroup::ELEMENTS, "k_smem")},
      {smem_view<Element>(V_OFFSET, NUM_KEY_GROUPS * VGroup::ELEMENTS, "v_smem")},
      {smem_view<Element>(Q_OFFSET, NUM_STAGES * QTile::ELEMENTS, "q_smem")},
      {smem_view<Element>(DO_OFFSET, NUM_DO_STAGES * DoTile::ELEMENTS, "dout_smem")},
      {smem_view<Element>(OUT_OFFSET, NUM_OUT_GROUPS * OutGroup::ELEMENTS, "out_smem")},
      {smem_view<Element>(DS_OFFSET, NUM_DS_TILES * DsTile::ELEMENTS, "ds_smem")},
      smem_view<float>(DQ_SHARED ? OUT_OFFSET : DQ_OFFSET, NUM_PLACES * PLACE_FLOATS, "dq_smem"),
      smem_view<uint32_t>(PROBS_OFFSET, PROBS_WORDS, "probs_smem"),
      smem_view<MaskElement>(MASK_OFFSET, MASK_ELEMENTS, "mask_smem"),
      smem_view<float>(STATS_OFFSET, NUM_STAGES * STATS_FLOATS, "stats_smem"),
      smem_view<int32_t>(COORDS_OFFSET, COORD_SLOTS * COORD_INTS, "coords_smem"),
      PACKED ? feed_at(FEED_OFFSET) : Feed(),
  };
  const Barriers bar = barriers();
  if (thread_idx() == 0) {
    tma_prefetch_map(params.k_map);
    tma_prefetch_map(params.v_map);
    tma_prefetch_map(params.q_map);
    tma_prefetch_map(params.dout_map);
    if (PACKED) init_feed(smem.feed);
    init_barriers(bar);
  }
  block_sync();  // orders the initialisation before every use
  if (runs_beside_dq(params)) {
    grid_starts_after_wait();
  } else {
    grid_dependency_wait();
  }

  if (warp_idx() < 4) {
    lower_registers<PRODUCER_REGISTERS>();
    if (warp_idx() == 0 && elect_lane()) produce(params, bar, smem);
    if (warp_idx() == 1) load_stats(params, bar, smem);
    if (PACKED && warp_idx() == 2) schedule_tiles<true>(params.attn, smem.feed);
    if constexpr (ALSO_DQ) {
      const int adder = warp_idx() - 2;
      if (adder >= 0 && elect_lane()) add_parts(params, bar, smem, adder);
    }
  } else if (DQ_ROLE && warp_idx() >= 4 * (NUM_CONSUMERS + 1)) {
    lower_registers<DQ_REGISTERS>();
    consume_ds(params, bar, smem);
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    if constexpr (!HAS_ROLES) {
      consume(params, bar, smem);
    } else if (warp_idx() < 8) {
      consume_scores(params, bar, smem);
    } else {
      consume_gradients(params, bar, smem);
    }
  }
}
