// attn_fwd_sm90.cuh - fused attention forward for Hopper: TMA loads on mbarriers, WGMMA with the
// accumulators in registers, a producer warp and NUM_CONSUMERS warpgroups of 64 query rows each.
//
//   S = scale * Q K^T      P = softmax(S + mask)      O = P V      lse = log(sum(exp(S + mask)))
//
// The algorithm is attn_fwd_wmma.cuh's (read that first); what differs is when things happen
// (FlashAttention-3, arXiv:2407.08608). A warpgroup issues S = Q K^T of the next key tile, then O
// += P V of the current one, and computes the next softmax while P V is under way; with PING_PONG,
// warpgroups take turns at issuing, so that one's softmax runs under another's products. In most
// key tiles the softmax does without the maxima (has_outgrown in tile/softmax.cuh). Where rows are
// few, KEY_SLICES warpgroups share the keys of 64 rows and add up at the end; SPLIT_KV spreads
// the keys of a row tile over blocks (tile/shares.cuh).
//
// Blocks are persistent: they walk over row tiles (fwd_sm90/schedule_sm90.cuh), keys from last to
// first, and a warpgroup passes over those that none of its 64 rows sees. One thread walks, loads
// the tiles as far ahead as the buffers allow, and tells the consumers where they are by a ring of
// coordinates, which comes with Q. A mask tensor's elements are copied by the consumer warps, each
// its own rows of the next key tile (fwd_sm90/mask_tile_sm90.cuh). Blocks may start while the
// kernels before this one still run (ptx/grid.cuh).
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/folded_rows.cuh"
#include "tile/mask.cuh"
#include "tile/max_score.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_varlen.cuh"
#include "tile/sequence.cuh"
#include "tile/shares.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/consumer_sm90.cuh"
#include "fwd_sm90/float8/few_rows_sm90.cuh"
#include "fwd_sm90/float8/float8_sm90.cuh"
#include "fwd_sm90/layout_sm90.cuh"
#include "fwd_sm90/mask_tile_sm90.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"
#include "fwd_sm90/producer_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "fwd_sm90/split_sm90.cuh"
//@if gate
#include "tile/gates.cuh"
//@end

// One key tile: S = Q K^T, and (unless FIRST) P V of the tile visited before it, are under way
// together; then the softmax of S.
//@if gate qk softmax
template <bool FIRST, bool MASKED, bool HAS_PV = false>
//@else
template <bool FIRST, bool MASKED, bool HAS_PV = !FIRST>
//@end
FC_DEVICE void key_tile(Consumer& c, const AttnParams& p, const Barriers& bar, const Buffers& smem,
                        int n_block, int n_block_begin) {
  WmmaAccum scores[KEY_FRAGS];
  if (!HAS_PV || !c.k_is_there) mbar_wait(bar.k_full + c.k_state.stage(), c.k_state.parity());
  if (PING_PONG && HAS_PV) await_issue(c);
  wgmma_fence();
  issue_scores(scores, c, smem.q[c.q_slot], smem.k, c.k_state.stage());
  wgmma_commit();
  if constexpr (HAS_PV) {
    wgmma_fence();
    issue_output(c, smem.v);
    wgmma_commit();
    if (PING_PONG) hand_over_issue(c);
  }
  // Masking takes registers, which P V of the tile before gives back as it ends. Under a left bound
  // every row tile ends in a masked tile, so it pays to hold them, if nothing else takes some.
  constexpr bool LEFT_BOUND_OVERLAPS = HAS_WINDOW_LEFT && MASK_KIND == 0 && !HAS_SOFTCAP;
  constexpr bool OVERLAP = OVERLAPS && HAS_PV && (!MASKED || LEFT_BOUND_OVERLAPS);
  wgmma_wait<OVERLAP ? 1 : 0>();
  wgmma_hold(scores);
  const auto release_inputs = [&] {
    release(bar.k_empty, c.k_state);
    if (RELEASES_Q_EARLY && n_block < n_block_begin + KEY_SLICES) release_q(c, bar);
  };
  if (FLOAT8) scale_products(scores, c.queries);
  constexpr bool TRIES_OLD_MAX = MAY_TRY_OLD_MAX && HAS_PV && !MASKED;
  if (!TRIES_OLD_MAX) release_inputs();
//@if gate qk
  gate_store_scores(scores, p, c.block, c.warp_row, n_block * BLOCK_N);
  ++c.k_state.count;
  return;
//@end
  ask_ahead(c, bar);
  c.hidden = false;
  float rescale[2];
  constexpr bool IN_PARTS = FIRST && SPLITS_FIRST_TILE;
  constexpr int FIRST_PART = IN_PARTS ? first_part_of(KEY_FRAGS) : KEY_FRAGS;
  SecondPart<IN_PARTS> second = {p, c.warp_row, n_block * BLOCK_N};
//@if gate pv
  const bool moved = false;
  gate_load_probs(scores, p, c.block, c.warp_row, n_block * BLOCK_N);
//@else
  scale_scores(scores, p);
  if constexpr (MASK_KIND != 0) c.mask.add_to(scores, p, c.warp_row, n_block);
  if constexpr (MASK_KIND != 0 && !TRIES_OLD_MAX) c.mask.fetch_next(p, c.warp_row, n_block);
  if constexpr (MASKED) hide_scores<0, FIRST_PART>(scores, p, c.warp_row, n_block * BLOCK_N);
  bool moved = false;
  if constexpr (TRIES_OLD_MAX) {
    const float max_log2[2] = {c.softmax.row_max[0] * c.scale_log2,
                               c.softmax.row_max[1] * c.scale_log2};
    float tile_sum[2];
    exponentiate<0, KEY_FRAGS>(scores, tile_sum, max_log2, c.scale_log2);
    const bool outgrown = has_outgrown<ASKS_ONCE>(tile_sum, max_log2);  // of a whole warpgroup
    bool needs_scores = named_barrier_any(STORE_BARRIER + c.index, 128, outgrown);
    if constexpr (SKIPS_HIDDEN) {
      needs_scores = warp_any(needs_scores);  // see any_of_warpgroup
      // Rows that have seen nothing yet outgrow anything, also a tile that the mask hides. Nothing
      // of such a tile counts.
      if (needs_scores) {
        c.hidden = is_hidden(c, p, n_block);
        needs_scores = !c.hidden;
        if (c.hidden) {
#pragma unroll
          for (int n = 0; n < KEY_FRAGS; ++n) wmma_fill(scores[n], 0.0f);
          tile_sum[0] = tile_sum[1] = 0.0f;
        }
      } else if (n_block / KEY_SLICES % HIDDEN_STEP == 0) {
        c.hidden = is_nothing(c, tile_sum);
      }
    }
    if (needs_scores) {
      wgmma_fence();
      issue_scores(scores, c, smem.q[c.q_slot], smem.k, c.k_state.stage());
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_hold(scores);
      if (FLOAT8) scale_products(scores, c.queries);
      scale_scores(scores, p);
      if constexpr (MASK_KIND != 0) c.mask.add_to(scores, p, c.warp_row, n_block);
      moved = softmax_step<LAZY_RESCALE, ASKS_ONCE>(scores, c.softmax, rescale, c.scale_log2);
    } else {
      c.softmax.row_sum[0] += tile_sum[0];
      c.softmax.row_sum[1] += tile_sum[1];
    }
    release_inputs();
    if constexpr (MASK_KIND != 0) c.mask.fetch_next(p, c.warp_row, n_block);
  } else {
    moved = softmax_step<LAZY_RESCALE, ASKS_ONCE, FIRST && ASKS_ONCE>(scores, c.softmax, rescale,
                                                                      c.scale_log2, second);
  }
//@end
//@if gate softmax
  gate_store_scores(scores, p, c.block, c.warp_row, n_block * BLOCK_N);
  gate_store_rows(c.softmax, p, c.block, c.warp_row, n_block, c.scale_log2);
  ++c.k_state.count;
  return;
//@end

  // Here, so that P V of this tile can be issued at once; and as ptxas would move the wait for P V
  // above the exponentials, were there no branch in between.
  if (!c.v_is_there) mbar_wait(bar.v_full + c.k_state.stage(), c.k_state.parity());
  if constexpr (HAS_PV) {
    if (OVERLAP) wgmma_wait<0>();
    wgmma_hold(c.out);
    release(bar.v_empty, c.v_state());
    if (moved) rescale_output(c.out, rescale);
  }
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
    wmma_accum_to_a(c.probs[n], scores[n]);
    if (n >= FIRST_PART && !second.is_seen) wmma_clear(c.probs[n]);
  }
  ++c.k_state.count;
}

// P V of the key tile visited last.
FC_DEVICE void last_output(Consumer& c, const Barriers& bar, const Buffers& smem) {
//@if gate qk softmax
  clear_output(c);
  return;
//@end
  wgmma_fence();
  issue_output(c, smem.v);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(c.out);
  release(bar.v_empty, c.v_state());
}

// Divides by the row sums and sends a warpgroup's 64 rows of O on their way by TMA, which clips
// rows and columns past the tensor's end; writes their lse.
FC_DEVICE void store_output(Consumer& c, const AttnSm90Params& params, const Barriers& bar,
                            const Buffers& smem, const BlockCoord& block) {
  const auto& p = sequence_params(params.attn, block);
  float inverse_sum[2];
  finish_softmax(c.softmax, p, lse_offset(p, block, c.warp_row), p.seqlen_q - c.warp_row,
                 block.head_idx, inverse_sum);

  const bool leads = warp_idx() % 4 == 0 && elect_lane();
  const OGroup o = smem.o[c.row_group];
  const int lane = opaque(lane_idx());  // or addresses computed once for all tiles live in between
  const int row = warp_idx() % 4 * 16 + lane % 16;
  const BoxOrigin box = query_box(params.attn, block);
  const int first_row = block.m_begin + c.row_group * 64;
  const bool has_rows = !PACKED || first_row < p.seqlen_q;
#pragma unroll
  for (int begin = 0; begin < V_CHUNKS; begin += O_CHUNKS) {
    const int end = min_i(V_CHUNKS, begin + O_CHUNKS);
    if (leads) tma_store_wait_read<0>();               // of the O that lay here before
    named_barrier_sync(STORE_BARRIER + c.index, 128);  // orders that before the writes below
#pragma unroll
    for (int d = begin * CHUNK / 16; d < min_i(OUT_FRAGS, end * CHUNK / 16); ++d) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float scale = inverse_sum[row_of_element(i)];
        packed[i / 2] = pack2<Element>(c.out[d].x[i] * scale, c.out[d].x[i + 1] * scale);
      }
      stmatrix_x4(o.at(row, d * 16 - begin * CHUNK, lane / 16 * 8), packed);
    }
    fence_proxy_async();
    named_barrier_sync(STORE_BARRIER + c.index, 128);  // orders the writes above before the stores
    if (leads) {
      for (int chunk = begin; has_rows && chunk < end; ++chunk) {
        const auto from = o.chunk(chunk - begin);
        if constexpr (FOLDS_PACKED) {  // the maps of q and o have heads for rows
          tma_store(params.o_map, from, chunk * CHUNK, block.head_idx,
                    box.row + query_of(p, first_row), box.batch);
        } else {
          tma_store(params.o_map, from, chunk * CHUNK, box.row + first_row, block.head_idx,
                    box.batch);
        }
      }
      tma_store_commit();
    }
  }
}

// A consumer warpgroup: 64 query rows of every row tile of this block.
FC_DEVICE void consume(const AttnSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  Consumer c;
  c.index = warp_uniform(warp_idx() / 4 - 1);
  c.row_group = c.index / KEY_SLICES;
  const int slice = c.index % KEY_SLICES;
  c.k_state.ring = slice;
  c.mask.smem = smem.mask + (warp_idx() - 4) * MASK_WARP_ELEMENTS;
  c.scale_log2 = softmax_scale_log2(p);
  // The first turn is consumer 0's: the last consumer hands it over.
  if (PING_PONG && c.index == NUM_CONSUMERS - 1) named_barrier_arrive(ISSUE_BARRIER, 256);

  for (int turn = 0;; ++turn) {
    c.q_slot = q_slot(turn, c.row_group);
    if (KEY_SLICES > 1 && ASKS_ONCE) c.k_state.make_uniform();
    const bool is_known = KNOWS_FIRST_PIECE && turn == 0;  // before Q is there
    if (!is_known) mbar_wait(bar.q_full + c.q_slot, q_parity(turn));
    const auto coord = coord_slot(smem.coords, turn);
    BlockCoord block = {};
    block.m_begin = smem_load(coord);
    if (block.m_begin == NO_TILE) break;
    if (VARLEN != 0 || MASK_KIND != 0 || SPLIT_KV) block = load_coord(coord);
    const auto& own = sequence_params(p, block);
    float of_products = 1.0f;  // what the softmax has to multiply them by, besides softmax_scale
    if constexpr (FLOAT8) {
      load_queries(c.queries, smem.q[c.q_slot], STORE_BARRIER + c.index);
      if (!scales_products(c.queries)) of_products = c.queries.inverse[0];
    }
    if (FLOAT8) c.scale_log2 = softmax_scale_log2(own) * of_products;
//@if gate tile
    const Range keys = gate_last_tile(own_keys(own, block));
//@else
    const Range keys = own_keys(own, block);
//@end
    const int group_row = block.m_begin + c.row_group * 64;
//@if gate
    const Range seen = keys;
//@else
    const Range seen = KEY_SLICES > 1 ? keys : own_key_tiles<64>(own, keys, group_row);
//@end
    const Range unmasked = unmasked_key_tiles<64>(own, group_row);
    c.warp_row = group_row + warp_idx() % 4 * 16;
    c.mask.n_block_begin = seen.begin;
    c.mask.gmem = mask_of(p, block.batch_idx, block.head_idx);
    c.softmax = {{NEG_INF, NEG_INF}, {0.0f, 0.0f}};
//@if gate
    c.block = load_coord(coord);
//@end
//@if gate pv
    c.softmax = {{0.0f, 0.0f}, {0.25f, 0.25f}};  // four lanes' shares add up to 1: no normalisation
//@end
    c.has_out = false;
    if (!IS_PLAIN) clear_output(c);
    if (is_known) mbar_wait(bar.q_full + c.q_slot, q_parity(turn));

    // All consumers count all key tiles of the block, and all but the first give a turn.
    int n_block = keys.end - 1 - slice;
    const auto skip_down_to = [&](int end) {
      for (; n_block >= end; --n_block) {
        if (PING_PONG && n_block < keys.end - 1) pass_issue(c);
        skip_key_tile(c, bar);
      }
    };
    if (KEY_SLICES == 1) skip_down_to(seen.end);
    const int begin = seen.begin;
    const bool sees_keys = n_block >= begin;
    if (sees_keys) {
      if (PING_PONG && n_block < keys.end - 1) pass_issue(c);
      if constexpr (MASK_KIND != 0) c.mask.fetch(own, c.warp_row, n_block);
      key_tile<true, true>(c, own, bar, smem, n_block, begin);
      if (SKIPS_HIDDEN) c.hidden = is_nothing(c, c.softmax.row_sum);
      n_block -= KEY_SLICES;
      for (; n_block >= max_i(unmasked.end, begin); n_block -= KEY_SLICES) {
        key_tile<false, true>(c, own, bar, smem, n_block, begin);
      }
      for (; n_block >= max_i(unmasked.begin, begin); n_block -= KEY_SLICES) {
        if (SKIPS_HIDDEN && c.hidden && is_hidden(c, own, n_block)) {
          hidden_key_tile(c, own, bar, n_block);
        } else {
          key_tile<false, false>(c, own, bar, smem, n_block, begin);
        }
      }
      if (HAS_WINDOW_LEFT) {
        for (; n_block >= begin; n_block -= KEY_SLICES) {
          key_tile<false, true>(c, own, bar, smem, n_block, begin);
        }
      }
    }
    if (!RELEASES_Q_EARLY || !sees_keys) {
      warp_sync();  // lanes may still wait for q_full, whose next phase must not pass them
      release_q(c, bar);
    }
    if (sees_keys) {
      last_output(c, bar, smem);
    } else if (IS_PLAIN) {
      clear_output(c);
    }
    if (HAS_WINDOW_LEFT && KEY_SLICES == 1) skip_down_to(keys.begin);
    if constexpr (FLOAT8) {  // what follows knows nothing of factors
      c.softmax.row_max[0] *= of_products;
      c.softmax.row_max[1] *= of_products;
      c.scale_log2 = softmax_scale_log2(own);
    }
    if (RETURNS_MAX_SCORE) raise_max_score(c.softmax, own, load_coord(coord), c.warp_row);
    if (KEY_SLICES > 1) {
      merge_slices(slice, turn, c.softmax, c.out, bar, smem.merge, c.scale_log2);
    }
    if (SPLIT_KV && slice == 0) {
      if (STREAM_K) block = load_coord(coord);  // again, or it would take registers so long
      const auto sync = [&] { named_barrier_sync(STORE_BARRIER + c.index, 128); };
      hand_over_partial<PARTIAL_PACKETS>(own, block, c.row_group, c.softmax, c.out, c.scale_log2,
                                         sync, smem.arrival + c.row_group);
    }
    if (!SPLIT_KV && slice == 0) store_output(c, params, bar, smem, load_coord(coord));
  }
  // Shared memory must outlive the stores that read it.
  if (warp_idx() % 4 == 0 && elect_lane()) tma_store_wait_read<0>();
}

FC_KERNEL(attn_fwd_sm90, NUM_THREADS, MIN_BLOCKS)(FC_PARAM(AttnSm90Params) params) {
  const Buffers smem = {
      QGroup::view(0, NUM_Q_SLOTS, "q_smem"),
      KTile::view(K_OFFSET, NUM_STAGES, "k_smem"),
      VTile::view(V_OFFSET, NUM_STAGES, "v_smem"),
      OGroup::view(O_OFFSET, NUM_O_GROUPS, "o_smem"),
      smem_view<float>(MERGE_OFFSET, MERGE_FLOATS, "merge_smem"),
      smem_view<MaskElement>(MASK_OFFSET, MASK_ELEMENTS, "mask_smem"),
      smem_view<int32_t>(COORDS_OFFSET, COORD_SLOTS * COORD_INTS, "coords_smem"),
      HAS_FEED ? feed_at(FEED_OFFSET) : Feed(),
      smem_view<int32_t>(ARRIVAL_OFFSET, ARRIVAL_BYTES / 4, "arrival_smem"),
      KLoad::view(K_LOAD_OFFSET, LOAD_STAGES, CONVERTS ? "k_bytes_smem" : "k_smem"),
      VLoad::view(V_LOAD_OFFSET, LOAD_STAGES, CONVERTS ? "v_bytes_smem" : "v_smem"),
      smem_view<int32_t>(ENDS_OFFSET, NUM_ENDS, "ends_smem"),
  };
  const Barriers bar = barriers(BARRIERS_OFFSET);
  if (thread_idx() == 0) {
    tma_prefetch_map(params.q_map);
    tma_prefetch_map(params.k_map);
    tma_prefetch_map(params.v_map);
    tma_prefetch_map(params.o_map);
    if (HAS_FEED) init_feed(smem.feed);
    init_barriers(bar, NUM_ROW_GROUPS * 4, KEY_SLICES * 4);
  }
  place_first_piece(params.attn, params.schedule, smem.coords);
  if constexpr (FOLDS_PACKED) clear_rows_of_nobody(params.attn, smem.q);
  block_sync();  // orders the initialisation before every use
  grid_dependency_wait();

  if (warp_idx() < 4) {
    lower_registers<PRODUCER_REGISTERS>();
    if (warp_idx() < LOADERS && (WHOLE_WARP || elect_lane())) produce(params, bar, smem);
    if (HAS_FEED && warp_idx() == 1) schedule_tiles(params.attn, smem.feed);
  } else if (CONVERTS && warp_idx() >= 4 * (NUM_CONSUMERS + 1)) {
    lower_registers<CONVERTER_REGISTERS>();
    if constexpr (CONVERTS) convert_tiles(bar, smem);
  } else {
    raise_registers<CONSUMER_REGISTERS>();
    if constexpr (FEW_ROWS) {
      consume_few_rows(params.attn, bar, smem);
    } else {
      consume(params, bar, smem);
    }
  }
}
