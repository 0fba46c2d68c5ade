// The row tiles that persistent blocks take, by the Hopper kernel's own schedule, for many launches
// of as many blocks as this one has: which tile came when.
#pragma once

#include "prims_sm90.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "fwd_sm90/schedule_sm90.cuh"

struct TileWalkParams {
  GmemPtr<const int32_t> cases;  // [num_cases, 4]: heads, heads a group, tiles a head, first place
  GmemPtr<int32_t> places;       // [all cases' heads and row tiles]: place in the order, from 1 on
  GmemPtr<int32_t> counters;     // [num_cases]
  int32_t num_cases;
};

FC_KERNEL(tile_walk, 32, 1)(const TileWalkParams params) {
  for (int i = thread_idx(); i < params.num_cases; i += 32) {
    const auto told = params.cases + i * 4;
    AttnParams p = {};
    p.num_heads_q = p.num_heads_kv = gmem_load(told);
    p.num_m_blocks = gmem_load(told + 2);
    p.tile_counter = params.counters + i;
    const TileSchedule schedule = {gmem_load(told), gmem_load(told + 1)};
    const auto places = params.places + gmem_load(told + 3);
    // A launch has no more blocks than row tiles.
    if (block_idx() >= p.num_heads_q * p.num_m_blocks) continue;
    for (TileWalk tile; !tile.done(p, schedule); tile.advance(p, schedule)) {
      const BlockCoord block = tile.coord(p, schedule);
      const int m_block = block.m_begin / BLOCK_M;
      gmem_atomic_add(places + (block.head_idx * p.num_m_blocks + m_block), tile.number + 1);
      tile.ask(p, schedule);
    }
  }
}
