// tile/schedule_sm90.cuh - the order in which a persistent block takes row tiles.
//
// Without a right bound all tiles cost the same: blocks stride over them, a head's tiles side by
// side, so that its K and V stay in L2.
//
// Under a right bound (causal) row tile m costs about m + 1 key tiles. The first heads, the lead,
// go in pairs of tiles m and M - 1 - m, which all cost the same, again a head's pairs side by side.
// A plain stride over pairs would leave some blocks without a last one, so the tiles of the last
// heads, the tail, are dealt out singly: those of all its heads by falling length, to and fro over
// the blocks, after the blocks that were short of a pair of the lead have got one more.
#pragma once

struct TileSchedule {
  int32_t num_heads;       // num_heads_q * batch
  int32_t num_lead_heads;  // of these; all without a right bound
};

struct TileWalk {
  int slot = block_idx();  // the next is num_blocks() further
  int second = 0;          // of a pair in the lead

  FC_DEVICE static int units_per_head(const AttnParams& p) {
    return HAS_WINDOW_RIGHT ? (p.num_m_blocks + 1) / 2 : p.num_m_blocks;
  }

  // Slots from the tail's first one on; negative in the lead.
  FC_DEVICE int past_lead(const AttnParams& p, const TileSchedule& schedule) const {
    return slot - schedule.num_lead_heads * units_per_head(p);
  }

  // Which of the tail's tiles, by falling length.
  FC_DEVICE int tail_tile(int past_lead) const {
    const int num_slots_of_round = past_lead - block_idx();  // 0 or more in whole rounds
    const bool backwards = num_slots_of_round >= 0 && num_slots_of_round / num_blocks() % 2 != 0;
    return backwards ? past_lead + num_blocks() - 1 - 2 * block_idx() : past_lead;
  }

  FC_DEVICE bool done(const AttnParams& p, const TileSchedule& schedule) const {
    const int past = past_lead(p, schedule);
    if (!HAS_WINDOW_RIGHT) return past >= 0;
    return past >= 0 &&
           tail_tile(past) >= (schedule.num_heads - schedule.num_lead_heads) * p.num_m_blocks;
  }

  FC_DEVICE BlockCoord coord(const AttnParams& p, const TileSchedule& schedule) const {
    const int past = past_lead(p, schedule);
    int head, m_block;
    if (!HAS_WINDOW_RIGHT || past < 0) {
      head = slot / units_per_head(p);
      const int j = slot % units_per_head(p);
      m_block = HAS_WINDOW_RIGHT && second == 0 ? p.num_m_blocks - 1 - j : j;
    } else {
      const int num_tail_heads = schedule.num_heads - schedule.num_lead_heads;
      const int tile = tail_tile(past);
      head = schedule.num_lead_heads + tile % num_tail_heads;
      m_block = p.num_m_blocks - 1 - tile / num_tail_heads;
    }
    BlockCoord block = head_coord(p, head);
    block.m_begin = m_block * BLOCK_M;
    return block;
  }

  FC_DEVICE void advance(const AttnParams& p, const TileSchedule& schedule) {
    const int j = slot % units_per_head(p);
    if (HAS_WINDOW_RIGHT && past_lead(p, schedule) < 0 && second == 0 &&
        p.num_m_blocks - 1 - j != j) {
      second = 1;
    } else {
      second = 0;
      slot += num_blocks();
    }
  }
};

// A row tile's place as the producer hands it to the consumers.
constexpr int COORD_INTS = SPLIT_KEYS ? 5 : 4;
// The producer writes a tile's when one group of rows has done with Q of the tile before, while
// another may still store O of the one before that.
constexpr int COORD_SLOTS = 4;
constexpr int NO_TILE = -1;  // in the place of the first row: all tiles are done

// Of a block's tile number `turn`.
FC_DEVICE SmemPtr<int32_t> coord_slot(SmemPtr<int32_t> coords, int turn) {
  return coords + turn % COORD_SLOTS * COORD_INTS;
}

FC_DEVICE void store_coord(SmemPtr<int32_t> to, const BlockCoord& block) {
  smem_store(to, block.m_begin);
  smem_store(to + 1, block.head_idx);
  smem_store(to + 2, block.head_idx_kv);
  smem_store(to + 3, block.batch_idx);
  if (SPLIT_KEYS) smem_store(to + 4, block.split);
}

FC_DEVICE BlockCoord load_coord(SmemPtr<int32_t> from) {
  BlockCoord block = {smem_load(from + 3), smem_load(from + 1), smem_load(from + 2),
                      smem_load(from)};
  if (SPLIT_KEYS) block.split = smem_load(from + 4);
  return block;
}
