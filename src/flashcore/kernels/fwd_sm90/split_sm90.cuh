// fwd_sm90/split_sm90.cuh - keys of a row tile that the Hopper kernel's blocks share, as many
// splits of each as the host says; what becomes of shares: tile/shares.cuh.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"

// The pieces of a row tile come side by side; row tiles are in the order of block_coord.
struct SplitWalk {
  int piece = block_idx();

  FC_DEVICE static int num_pieces(const AttnParams& p, const TileSchedule& schedule) {
    return schedule.num_heads * p.num_m_blocks * p.splits.num_splits;
  }

  FC_DEVICE bool done(const AttnParams& p, const TileSchedule& schedule) const {
    return piece >= num_pieces(p, schedule);
  }

  FC_DEVICE BlockCoord coord(const AttnParams& p, const TileSchedule& schedule) const {
    const int num_splits = p.splits.num_splits;
    const int row_tile = piece / num_splits;
    BlockCoord block = block_coord(p, row_tile);
    block.split = piece - row_tile * num_splits;
    block.is_last = piece + num_blocks() >= num_pieces(p, schedule);
    const Range keys = key_tiles(sequence_params(p, block), block.m_begin);
    const int num_tiles = keys.end - keys.begin;
    const int at_least = num_tiles / num_splits;
    const int one_more = num_tiles - at_least * num_splits;  // so many pieces, the first ones
    block.tile_begin = block.split * at_least + min_i(block.split, one_more);
    block.tile_end = block.tile_begin + at_least + (block.split < one_more ? 1 : 0);
    return block;
  }

  FC_DEVICE void ask(const AttnParams&, const TileSchedule&) {}
  FC_DEVICE void advance(const AttnParams&, const TileSchedule&) { piece += num_blocks(); }
};

// True where the place of a block's first piece takes nothing but the launch's parameters: a thread
// that has no other part in the set-up finds it, as divisions take longer than the rest of that.
constexpr bool KNOWS_FIRST_PIECE = SPLIT_KV && !STREAM_K && VARLEN == 0 && !FLOAT8;
constexpr int PLACING_THREAD = 32;

FC_DEVICE void place_first_piece(const AttnParams& p, const TileSchedule& schedule,
                                 SmemPtr<int32_t> coords) {
  if (!KNOWS_FIRST_PIECE || thread_idx() != PLACING_THREAD) return;
  store_coord(coord_slot(coords, 0), SplitWalk().coord(p, schedule));
}

// Bytes that say whether a warpgroup was the last of its rows, one int for each group of rows.
constexpr int ARRIVAL_BYTES = SPLIT_KV ? 16 : 0;
static_assert(!SPLIT_KV || NUM_ROW_GROUPS <= 4, "no room for more");

// Packets of partial results that a thread has under way at once, for it is their latency that
// counts: as many as registers hold, of which a mask takes some, and so does a wide O.
constexpr bool FEWER_PACKETS =
    MASK_KIND != 0 || STREAM_K || HEAD_DIM_V > 128 || CONSUMER_REGISTERS < 240;
constexpr int PARTIAL_PACKETS = CONSUMER_REGISTERS < 128 && FEW_ROWS ? 8
                                : CONSUMER_REGISTERS < 224             ? 16
                                : FEWER_PACKETS                        ? 24
                                                                       : 32;
