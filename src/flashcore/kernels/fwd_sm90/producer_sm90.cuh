// fwd_sm90/producer_sm90.cuh - the producer of the Hopper kernel: one thread walks over the block's
// row tiles, has TMA load their Q, and K and V as far ahead as the stages allow, and tells the
// consumers which row tile it is. If a key tile lies in several pages, the other lanes of its warp
// follow it, and load K and V with it (fwd_sm90/pages_sm90.cuh).
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/folded_rows.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_varlen.cuh"
#include "tile/sequence.cuh"
#include "tile/shares.cuh"
#include "tile/smem_tile.cuh"
#include "tile/stream_k.cuh"
#include "fwd_sm90/float8/float8_sm90.cuh"
#include "fwd_sm90/layout_sm90.cuh"
#include "fwd_sm90/pages_sm90.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "fwd_sm90/split_sm90.cuh"
//@if gate
#include "tile/gates.cuh"
//@end

// The row tiles of a block, one after the other.
template <bool FROM_FEED = HAS_FEED, bool IN_PIECES = SPLIT_KV, bool IN_RANGES = STREAM_K>
FC_DEVICE auto row_tiles(const AttnParams& p, const Feed& feed) {
  if constexpr (FROM_FEED) {
    return TileFeed<>(p, feed);
  } else if constexpr (IN_RANGES) {
    return StreamWalk(p);
  } else if constexpr (IN_PIECES) {
    static_assert(!IN_PIECES || !PACKED, "the host does not know packed sequences' row tiles");
    return SplitWalk();
  } else {
    return TileWalk();
  }
}

// By all threads, before the barrier that ends the setup: zeros in rows of Q that no box brings, if
// the heads of a group do not divide 64. Whatever lay there would have scores.
FC_DEVICE void clear_rows_of_nobody(const AttnParams& p, QGroup q) {
  const int first = rows_of_box(p);
  constexpr int PACKETS = CHUNK / 8;  // of a row of a chunk
  const int of_chunk = (BOX_OF_ROWS - first) * PACKETS;
  for (int i = thread_idx(); i < of_chunk * (NUM_Q_SLOTS * QK_CHUNKS); i += NUM_THREADS) {
    const int place = i % of_chunk;
    const auto chunk = q.smem + i / of_chunk * QGroup::CHUNK_ELEMENTS;
    smem_store_packet(chunk + (first * CHUNK + place * 8), Packet<16>{});
  }
  fence_proxy_async();
}

// Of Q, what TMA loads as one.
FC_DEVICE int bytes_of_box(const AttnParams& p) {
  return FOLDS_PACKED ? QK_CHUNKS * CHUNK_BYTES * rows_of_box(p) : QGroup::BYTES;
}

// True where one thread is not enough: lanes find the block's range, or load boxes of pages.
constexpr bool WHOLE_WARP = LOADS_BY_LANES || STREAM_K;

// Under LOADERS == 2 a warp loads keys and Q, and another one values. Each walks over the pieces of
// the block's range by itself, all lanes alike.
static_assert(LOADERS == 1 || (LOADS_BY_LANES && SPLIT_KV && !CONVERTS), "no two draw alike");

FC_DEVICE void produce(const AttnSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  const int loader = LOADERS > 1 ? warp_uniform(warp_idx()) : 0;
  const bool loads_k = LOADERS == 1 || loader == 0;
  const bool loads_v = LOADERS == 1 || loader == 1;
  const bool leads = !WHOLE_WARP || lane_idx() == 0;
  BoxOrigin q_box, k_box, v_box;  // of the sequence
  PageBoxes pages = {params};     // read only under PAGED
  LoadState k_states[KEY_SLICES], v_states[KEY_SLICES];
#pragma unroll
  for (int s = 0; s < KEY_SLICES; ++s) k_states[s].ring = v_states[s].ring = s;

  const auto load_k = [&](LoadState& k_state, const BlockCoord& block, int n_block) {
    const int stage = k_state.stage();
    const auto full = bar.k_load_full + stage;
    const auto await = [&] {
      if (leads) {
        mbar_wait(bar.k_load_empty + stage, k_state.parity() ^ 1);
        if (CONVERTS) smem_store(smem.ends + stage, 0);
        mbar_arrive_expect_tx(full, KLoad::BYTES);
      }
      if (LOADS_BY_LANES) warp_sync();  // orders wait and announcement before all lanes' loads
    };
    if (PAGED) {
      pages.load_k(smem.k_loads[stage], full, k_state.ring, n_block, await);
    } else {
      await();
      smem.k_loads.load(stage, params.k_map, full, k_box.row + n_block * BLOCK_N,
                        block.head_idx_kv, k_box.batch);
    }
    ++k_state.count;
  };
  const auto load_v = [&](LoadState& v_state, const BlockCoord& block, int n_block) {
//@if gate qk softmax
    return;  // there is no P V
//@end
    const int stage = v_state.stage();
    const auto full = bar.v_load_full + stage;
    const auto await = [&] {
      if (leads) {
        mbar_wait(bar.v_load_empty + stage, v_state.parity() ^ 1);
        if (CONVERTS) smem_store(smem.ends + (LOAD_STAGES + stage), 0);
        mbar_arrive_expect_tx(full, VLoad::BYTES);
      }
      if (LOADS_BY_LANES) warp_sync();  // as for K
    };
    if (PAGED) {
      pages.load_v(smem.v_loads[stage], full, v_state.ring, n_block, await);
    } else {
      await();
      smem.v_loads.load(stage, params.v_map, full, v_box.row + n_block * BLOCK_N,
                        block.head_idx_kv, v_box.batch);
    }
    ++v_state.count;
  };

  const auto load_keys = [&](const BlockCoord& block, const Range& keys, int n_block) {
#pragma unroll
    for (int s = 0; s < KEY_SLICES; ++s) {
      if (PAGED) pages.advance(s, keys, n_block - s - KEY_SLICES);
      if (loads_k && n_block - s >= keys.begin) load_k(k_states[s], block, n_block - s);
    }
  };

  auto tile = row_tiles(p, smem.feed);
  if (!LOADS_BY_LANES && !leads) return;
  const bool walks = LOADERS > 1 || leads;
  const bool places = leads && loader == 0;
  for (int turn = 0;; ++turn, walks ? tile.advance(p, params.schedule) : void()) {
    const auto coord = coord_slot(smem.coords, turn);
    bool done = walks && tile.done(p, params.schedule);
    if (done && places) smem_store(coord, NO_TILE);
    if (LOADS_BY_LANES && LOADERS == 1) {
      if (leads && !done) store_coord(coord, tile.coord(p, params.schedule));
      warp_sync();  // orders the place before the other lanes read it
      done = smem_load(coord) == NO_TILE;
    }
    if (done) {
      for (int group = 0; places && group < NUM_ROW_GROUPS; ++group) {
        mbar_wait(bar.q_empty + q_slot(turn, group), q_parity(turn) ^ 1);
        mbar_arrive(bar.q_full + q_slot(turn, group));
      }
      if (CONVERTS && leads) end_conversion(bar, smem, k_states[0], v_states[0]);
      if (places) grid_launch_dependents();
      return;
    }
    const bool is_known = (LOADS_BY_LANES && LOADERS == 1) || (KNOWS_FIRST_PIECE && turn == 0);
    const BlockCoord block = is_known ? load_coord(coord) : tile.coord(p, params.schedule);
    const auto& own = sequence_params(p, block);
    q_box = query_box(p, block);
    if (!PAGED) k_box = key_box(p, block, p.lengths.k_rows_per_batch);
    if (!PAGED) v_box = key_box(p, block, p.lengths.v_rows_per_batch);
//@if gate tile
    const Range keys = gate_last_tile(own_keys(own, block));
//@else
    const Range keys = own_keys(own, block);
//@end
    if (!is_known && places) store_coord(coord, block);
    // In the order of use: Q K^T of a tile is issued before P V of the tile visited before it. The
    // first K's stage is free before Q's buffer is.
    int n_block = keys.end - 1;
    if (PAGED) pages.begin(own, block, keys, n_block);
    load_keys(block, keys, n_block);
    for (int group = 0; places && group < NUM_ROW_GROUPS; ++group) {
      const int slot = q_slot(turn, group);
      const auto full = bar.q_full + slot;
      mbar_wait(bar.q_empty + slot, q_parity(turn) ^ 1);
      mbar_arrive_expect_tx(full, bytes_of_box(p));
      int row = block.m_begin + group * 64;
      if (PACKED) row = min_i(row, own.seqlen_q - 1);  // see make_ragged: no box without a row
      if constexpr (FOLDS_PACKED) {  // the map has heads for rows
        smem.q.load(slot, params.q_map, full, block.head_idx, q_box.row + query_of(own, row),
                    q_box.batch);
      } else {
        smem.q.load(slot, params.q_map, full, q_box.row + row, block.head_idx, q_box.batch);
      }
    }
    bool asked = false;
    while (n_block >= keys.begin) {
      n_block -= KEY_SLICES;
      if (!asked && n_block < keys.begin + ASK_AHEAD) {
        if (leads) tile.ask(p, params.schedule);
        asked = true;
      }
      load_keys(block, keys, n_block);
#pragma unroll
      for (int s = 0; s < KEY_SLICES; ++s) {
        const int before = n_block - s + KEY_SLICES;
        if (loads_v && before >= keys.begin) load_v(v_states[s], block, before);
      }
    }
    if (leads && !asked) tile.ask(p, params.schedule);  // it has no key tiles
  }
}
