// tile/schedule_varlen.cuh - row tiles of packed sequences, dealt out to persistent blocks as they
// ask for them.
//
// Only the device knows the lengths, and tiles of different sequences differ in cost. So a warp of
// each block, the scheduler, draws numbers from a counter in global memory and finds the number's
// tile: sequences in classes of falling length (powers of two of key tiles), in a sequence head by
// head, whose tiles run side by side and share K and V in L2; under a right bound (causal) the
// longest first. With short tiles last, blocks end nearly together. Coordinates reach the producer
// through shared memory, each when it asks for them.
#pragma once

constexpr int FEED_BYTES = PACKED ? 16 + 2 * 8 : 0;

struct Feed {
  SmemPtr<int32_t> coord;  // [4]: sequence, head, first row or -1 at the end, unused
  SmemPtr<uint64_t> full, asked;
};

FC_DEVICE Feed feed_at(int byte_offset) {
  const auto bars = smem_view<uint64_t>(byte_offset + 16, 2, "feed_barriers");
  return {smem_view<int32_t>(byte_offset, 4, "feed"), bars, bars + 1};
}

// By one thread, before the fence of init_barriers.
FC_DEVICE void init_feed(const Feed& feed) {
  mbar_init(feed.full, 1);
  mbar_init(feed.asked, 1);
}

// The sum over the lanes below, and over all lanes.
struct WarpScan {
  int below, total;
};

FC_DEVICE WarpScan warp_scan(int x) {
  WarpScan scan = {0, x};
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    const int other = shfl_xor(scan.total, bit);
    if (lane_idx() & bit) scan.below += other;
    scan.total += other;
  }
  return scan;
}

// Walks over all tiles in the order above, 32 sequences at a time, a lane each. Forward only.
// max_tiles is what lengths that do not overlap can have at most; others are cut off there.
struct SequenceWalk {
  int length_class;
  int first_sequence = 0;  // of the 32
  int before = 0;          // tiles before those of the 32 sequences
  int num_tiles = 0;       // of this lane's sequence, of one head
  WarpScan tiles = {0, 0};

  FC_DEVICE explicit SequenceWalk(const AttnParams& p)
      : length_class(p.lengths.num_length_classes - 1) {
    look(p);
  }

  FC_DEVICE void look(const AttnParams& p) {
    const int sequence = first_sequence + lane_idx();
    num_tiles = 0;
    if (sequence <= p.batch) {
      const int key_tiles = (key_rows(p, sequence).count + BLOCK_N - 1) / BLOCK_N;
      const bool longest = key_tiles > 1 << length_class;  // than the class holds
      const bool shorter = length_class > 0 && key_tiles <= 1 << (length_class - 1);
      if (!longest && !shorter) {
        num_tiles = (query_rows(p, sequence).count + BLOCK_M - 1) / BLOCK_M;
      }
    }
    tiles = warp_scan(num_tiles * p.num_heads_q);
  }

  // Goes on until tile `number` is among those of the 32 sequences. False past the last tile;
  // then `before` is their number.
  FC_DEVICE bool seek(const AttnParams& p, int number) {
    while (number >= before + tiles.total || number >= p.lengths.max_tiles) {
      before = min_i(before + tiles.total, p.lengths.max_tiles);
      first_sequence += 32;
      if (first_sequence > p.batch) {
        first_sequence = 0;
        if (--length_class < 0) return false;
      }
      look(p);
    }
    return true;
  }
};

// The scheduler: the whole warp.
FC_DEVICE void schedule_tiles(const AttnParams& p, const Feed& feed) {
  SequenceWalk walk(p);
  int number = block_idx();
  int drawn = -1;
  bool found = walk.seek(p, number);
  for (int count = 0;; ++count) {
    const int mine = number - walk.before - walk.tiles.below;  // of this lane's sequence
    if (found ? mine >= 0 && mine < walk.num_tiles * p.num_heads_q : lane_idx() == 0) {
      Packet<16> coord = {};
      coord.word[2] = uint32_t(-1);
      if (found) {
        const int tile = mine % walk.num_tiles;
        coord.word[0] = uint32_t(walk.first_sequence + lane_idx());
        coord.word[1] = uint32_t(mine / walk.num_tiles);
        coord.word[2] =
            uint32_t((HAS_WINDOW_RIGHT ? walk.num_tiles - 1 - tile : tile) * BLOCK_M);
      }
      smem_store_packet(feed.coord, coord);
      mbar_arrive(feed.full);
    }
    if (!found) break;
    mbar_wait(feed.asked, count % 2);
    warp_sync();  // or the next phase could pass a lane that still waits
    drawn = warp_scan(lane_idx() == 0 ? gmem_atomic_add(p.tile_counter, 1) : 0).total;
    number = num_blocks() + drawn;
    found = walk.seek(p, number);
  }
  // Every tile but a block's first was drawn, and every block that had one drew one too many: as
  // many draws as tiles. The last one leaves the counter at 0 for the next launch.
  if (lane_idx() == 0 && drawn >= 0 && drawn == walk.before - 1) {
    gmem_atomic_add(p.tile_counter, -walk.before);
  }
}

// The producer's view of the feed, in the form of TileWalk.
struct TileFeed {
  Feed feed;
  BlockCoord block;
  int count = 0;

  FC_DEVICE TileFeed(const AttnParams& p, const Feed& from) : feed(from) { advance(p); }

  FC_DEVICE bool done(const AttnParams&, const TileSchedule&) const { return block.m_begin < 0; }
  FC_DEVICE BlockCoord coord(const AttnParams&, const TileSchedule&) const { return block; }
  FC_DEVICE void ask(const AttnParams&, const TileSchedule&) { mbar_arrive(feed.asked); }
  FC_DEVICE void advance(const AttnParams& p, const TileSchedule&) { advance(p); }

  FC_DEVICE void advance(const AttnParams& p) {
    mbar_wait(feed.full, count % 2);
    const auto coord = smem_load_packet<16>(feed.coord);
    block.batch_idx = int(coord.word[0]);
    block.head_idx = int(coord.word[1]);
    block.head_idx_kv = block.head_idx / (p.num_heads_q / p.num_heads_kv);
    block.m_begin = int(coord.word[2]);
    ++count;
  }
};

// The row tiles of a block, one after the other.
template <bool FROM_FEED = PACKED, bool IN_PIECES = SPLIT_KV>
FC_DEVICE auto row_tiles(const AttnParams& p, const Feed& feed) {
  if constexpr (FROM_FEED) {
    static_assert(!IN_PIECES, "packed sequences are not split");
    return TileFeed(p, feed);
  } else if constexpr (IN_PIECES) {
    return SplitWalk();
  } else {
    return TileWalk();
  }
}
