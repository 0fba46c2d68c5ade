// The row tiles that persistent blocks take, by the Hopper kernel's own schedule: counted, with
// what they cost, for many launches of as many blocks as this one has.
#pragma once

#include "prims_sm90.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_sm90.cuh"

struct TileWalkParams {
  GmemPtr<const int32_t> cases;  // [num_cases, 4]: heads, lead heads, row tiles a head, first visit
  GmemPtr<int32_t> visits;       // [all cases' heads and row tiles]
  GmemPtr<int32_t> costs;        // [num_cases, blocks]: row tile m costs m + 1
  int32_t num_cases;
};

FC_KERNEL(tile_walk, 32, 1)(const TileWalkParams params) {
  for (int i = thread_idx(); i < params.num_cases; i += 32) {
    const auto told = params.cases + i * 4;
    AttnParams p = {};
    p.num_heads_q = p.num_heads_kv = gmem_load(told);
    p.num_m_blocks = gmem_load(told + 2);
    const TileSchedule schedule = {gmem_load(told), gmem_load(told + 1)};
    const auto visits = params.visits + gmem_load(told + 3);
    int cost = 0;
    for (TileWalk tile; !tile.done(p, schedule); tile.advance(p, schedule)) {
      const BlockCoord block = tile.coord(p, schedule);
      const int m_block = block.m_begin / BLOCK_M;
      gmem_atomic_add(visits + (block.head_idx * p.num_m_blocks + m_block), 1);
      cost += m_block + 1;
    }
    gmem_atomic_add(params.costs + (i * num_blocks() + block_idx()), cost);
  }
}
