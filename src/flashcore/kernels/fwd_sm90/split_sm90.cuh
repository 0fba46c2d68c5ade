// fwd_sm90/split_sm90.cuh - keys of a row tile that the Hopper kernel's blocks share, as many
// splits of each as the host says; what becomes of shares: tile/shares.cuh.
#pragma once

#include "prims_sm90.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"

// The pieces of a row tile come side by side; row tiles are in the order of block_coord.
struct SplitWalk {
  int piece = block_idx();

  FC_DEVICE bool done(const AttnParams& p, const TileSchedule& schedule) const {
    return piece >= schedule.num_heads * p.num_m_blocks * p.splits.num_splits;
  }

  FC_DEVICE BlockCoord coord(const AttnParams& p, const TileSchedule&) const {
    BlockCoord block = block_coord(p, piece / p.splits.num_splits);
    block.split = piece % p.splits.num_splits;
    return block;
  }

  FC_DEVICE void ask(const AttnParams&, const TileSchedule&) {}
  FC_DEVICE void advance(const AttnParams&, const TileSchedule&) { piece += num_blocks(); }
};

// Bytes that say whether a warpgroup was the last of its rows, one int for each group of rows.
constexpr int ARRIVAL_BYTES = SPLIT_KV ? 16 : 0;
static_assert(!SPLIT_KV || NUM_ROW_GROUPS <= 4, "no room for more");

// Packets of partial results that a thread has under way at once, for it is their latency that
// counts: as many as registers hold, of which a mask takes some, and so does a wide O.
constexpr bool FEWER_PACKETS = MASK_KIND != 0 || STREAM_K || HEAD_DIM_V > 128;
constexpr int PARTIAL_PACKETS = CONSUMER_REGISTERS < 224 ? 16 : FEWER_PACKETS ? 24 : 32;
