// fwd_sm90/schedule_sm90.cuh - the order in which a persistent block takes row tiles.
//
// Without a right bound all tiles cost the same: blocks stride over them, a head's tiles side by
// side, so that its K and V stay in L2.
//
// Under a right bound (causal) row tile m costs about m + 1 key tiles, so blocks draw tiles from a
// counter in global memory as they get free, the longest first: no block waits for another one's
// long tile at the end. Heads go in sections whose K and V fit into L2 together; the short tiles at
// the end of a section run beside the long ones of the next. The last section takes what does not
// make a whole one: a small last section would leave most blocks without work.
#pragma once

#include "prims.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"

constexpr bool DRAWS_TILES = HAS_WINDOW_RIGHT && !SPLIT_KV;

// The producer draws the next row tile this many key tiles before the end of the current one, so
// that the counter's answer is there in time. Drawing sooner costs 4 to 18 % of the time: a block
// then commits itself to a tile that another block would have been free for first.
constexpr int ASK_AHEAD = 2 * KEY_SLICES;

struct TileWalk {
  int number = block_idx();
  int drawn = -1;  // what the counter gave for the next tile; -1: nothing was drawn

  FC_DEVICE static int num_tiles(const AttnParams& p, const TileSchedule& schedule) {
    return schedule.num_heads * p.num_m_blocks;
  }

  FC_DEVICE bool done(const AttnParams& p, const TileSchedule& schedule) const {
    return number >= num_tiles(p, schedule);
  }

  // A place is a head, counted over the whole batch, and one of its row tiles.
  struct Place {
    int head, m_block;
  };

  FC_DEVICE Place place(const AttnParams& p, const TileSchedule& schedule) const {
    if (!DRAWS_TILES) return {number / p.num_m_blocks, number % p.num_m_blocks};
    return place_in_section(p, schedule);
  }

  FC_DEVICE Place place_in_section(const AttnParams& p, const TileSchedule& schedule) const {
    const int head = number / p.num_m_blocks;
    const int last_section = schedule.num_heads / schedule.heads_per_section - 1;
    const int section = min_i(head / schedule.heads_per_section, last_section);
    const int first_head = section * schedule.heads_per_section;
    const int num_heads =
        section < last_section ? schedule.heads_per_section : schedule.num_heads - first_head;
    const int tile = number - first_head * p.num_m_blocks;
    return {first_head + tile % num_heads, p.num_m_blocks - 1 - tile / num_heads};
  }

  FC_DEVICE BlockCoord coord(const AttnParams& p, const TileSchedule& schedule) const {
    const Place at = place(p, schedule);
    BlockCoord block = head_coord(p, at.head);
    block.m_begin = at.m_block * BLOCK_M;
    return block;
  }

  // Draws the number of the next tile. Must be called once a tile, before advance().
  FC_DEVICE void ask(const AttnParams& p, const TileSchedule& schedule) {
    // If every block has at most one tile, there is nothing to draw.
    if (DRAWS_TILES && num_tiles(p, schedule) > num_blocks()) {
      drawn = gmem_atomic_add(p.tile_counter, 1);
    }
  }

  FC_DEVICE void advance(const AttnParams& p, const TileSchedule& schedule) {
    if (!DRAWS_TILES || drawn < 0) {
      number += num_blocks();
      return;
    }
    number = num_blocks() + drawn;
    // A block's first tile is not drawn, and its last draw finds no tile: so there are as many
    // draws as tiles. The last draw of all sets the counter back to 0 for the next launch.
    if (drawn == num_tiles(p, schedule) - 1) gmem_atomic_add(p.tile_counter, -(drawn + 1));
  }
};

// The number of integers by which the producer tells the consumers a row tile's place.
constexpr int COORD_INTS = STREAM_K ? 9 : SPLIT_KV ? 8 : 4;
// The producer writes a tile's place once all groups of rows are done with Q of the tile two before
// (three before, with two buffers for Q). A group may still be storing that tile's O and read its
// place then, so there are four slots.
constexpr int COORD_SLOTS = 4;
constexpr int NO_TILE = -1;  // in the place of the first row: all tiles are done

// Returns the slot of a block's row tile number `turn`.
FC_DEVICE SmemPtr<int32_t> coord_slot(SmemPtr<int32_t> coords, int turn) {
  return coords + turn % COORD_SLOTS * COORD_INTS;
}

FC_DEVICE void store_coord(SmemPtr<int32_t> to, const BlockCoord& block) {
  smem_store(to, block.m_begin);
  smem_store(to + 1, block.head_idx);
  smem_store(to + 2, block.head_idx_kv);
  smem_store(to + 3, block.batch_idx);
  if (SPLIT_KV) {
    smem_store(to + 4, block.split);
    smem_store(to + 5, block.tile_begin);
    smem_store(to + 6, block.tile_end);
    if (!STREAM_K) smem_store(to + 7, block.is_last ? 1 : 0);
  }
  if (STREAM_K) {
    smem_store(to + 7, block.num_splits);
    smem_store(to + 8, block.first_slot);
  }
}

FC_DEVICE BlockCoord load_coord(SmemPtr<int32_t> from) {
  BlockCoord block = {smem_load(from + 3), smem_load(from + 1), smem_load(from + 2),
                      smem_load(from)};
  if (SPLIT_KV) {
    block.split = smem_load(from + 4);
    block.tile_begin = smem_load(from + 5);
    block.tile_end = smem_load(from + 6);
    if (!STREAM_K) block.is_last = smem_load(from + 7) != 0;
  }
  if (STREAM_K) {
    block.num_splits = smem_load(from + 7);
    block.first_slot = smem_load(from + 8);
  }
  return block;
}
