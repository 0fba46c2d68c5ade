// tile/schedule_sm90.cuh - the order in which a persistent block takes row tiles.
//
// Under a right bound (causal) row tile m costs about m + 1 key tiles. Taking tiles m and M - 1 - m
// of a head one after the other makes every such pair cost the same, so that a plain stride over
// the pairs (TILES_PER_UNIT = 2) keeps all blocks busy to the end; and the pairs of one head run
// side by side on the SMs, which share its K and V in L2. Without a right bound all tiles cost the
// same and are taken one by one; so are they, the longest first, where pairs would leave SMs
// without work.
#pragma once

FC_DEVICE int units_per_head(const AttnParams& p) {
  return (p.num_m_blocks + TILES_PER_UNIT - 1) / TILES_PER_UNIT;
}

struct TileWalk {
  int unit = block_idx();  // the next is num_blocks() further
  int index = 0;           // within the unit

  FC_DEVICE bool done(const AttnParams& p, int num_heads_and_batches) const {
    return unit >= units_per_head(p) * num_heads_and_batches;
  }

  FC_DEVICE BlockCoord coord(const AttnParams& p) const {
    const int head_and_batch = unit / units_per_head(p);
    const int j = unit % units_per_head(p);
    const int m_block = HAS_WINDOW_RIGHT && index == 0 ? p.num_m_blocks - 1 - j : j;
    BlockCoord block = head_coord(p, head_and_batch);
    block.m_begin = m_block * BLOCK_M;
    return block;
  }

  FC_DEVICE void advance(const AttnParams& p) {
    const int j = unit % units_per_head(p);
    if (TILES_PER_UNIT == 2 && index == 0 && p.num_m_blocks - 1 - j != j) {
      index = 1;
    } else {
      index = 0;
      unit += num_blocks();
    }
  }
};
