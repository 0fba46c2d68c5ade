// tile/schedule_varlen.cuh - tiles of packed sequences, dealt out to persistent blocks as they ask
// for them: of queries, or of keys where a kernel OWNS_KEYS (tile/sequence.cuh).
//
// Only the device knows the lengths, and tiles of different sequences differ in cost. So a warp of
// each block, the scheduler, draws numbers from a counter in global memory and finds the number's
// tile: sequences in classes of falling length (powers of two of the tiles that a block walks
// over), in a sequence head by head, whose tiles run side by side and share in L2 what they walk
// over; under a right bound (causal) the longest first. With short tiles last, blocks end nearly
// together. Coordinates reach the producer through shared memory, each when it asks for them.
#pragma once

#include "prims_sm90.cuh"
#include "tile/folded_rows.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"

constexpr int FEED_BYTES = PACKED ? 16 + 2 * 8 : 0;

struct Feed {
  // [4]: sequence, head (of k and v where the kernel OWNS_KEYS), first row or -1 at the end, unused
  SmemPtr<int32_t> coord;
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

// Where queries are few beside their keys, or keys are a cache's, decodes stand beside prompts.
constexpr bool ALTERNATES = FOLDS_PACKED || VARLEN == 4;

// Of sequences with so few rows that reading keys is all there is to do, or of others.
enum class TileKind { all, few_rows, many_rows };

FC_DEVICE bool is_of(TileKind kind, int rows) {
  return kind == TileKind::all || (rows <= 64) == (kind == TileKind::few_rows);
}

// Walks over all tiles of a kind in the order above, 32 sequences at a time, a lane each. Forward
// only. max_tiles is what lengths that do not overlap can have at most; others are cut off there.
template <bool OWNS_KEYS>
struct SequenceWalk {
  static constexpr bool WALKS_ROWS = OWNS_KEYS;
  static constexpr int OWN_ROWS = OWNS_KEYS ? BLOCK_N : BLOCK_M;  // of a tile
  static constexpr int WALKED_ROWS = OWNS_KEYS ? BLOCK_M : BLOCK_N;

  TileKind kind;
  int length_class;
  int first_sequence = 0;  // of the 32
  int before = 0;          // tiles before those of the 32 sequences
  int num_tiles = 0;       // of this lane's sequence, of one head
  WarpScan tiles = {0, 0};

  FC_DEVICE SequenceWalk(const AttnParams& p, TileKind of)
      : kind(of), length_class(p.lengths.num_length_classes - 1) {
    look(p);
  }

  FC_DEVICE static int num_heads(const AttnParams& p) {
    if (OWNS_KEYS) return p.num_heads_kv;
    return FOLDS_PACKED ? p.num_heads_q / heads_folded(p) : p.num_heads_q;
  }

  FC_DEVICE void look(const AttnParams& p) {
    const int sequence = first_sequence + lane_idx();
    num_tiles = 0;
    if (sequence <= p.batch) {
      const int queries = query_rows<OWNS_KEYS>(p, sequence).count;
      const int keys = key_rows<OWNS_KEYS>(p, sequence).count;
      const int walked = ((OWNS_KEYS ? queries : keys) + WALKED_ROWS - 1) / WALKED_ROWS;
      const bool longest = walked > 1 << length_class;  // than the class holds
      const bool shorter = length_class > 0 && walked <= 1 << (length_class - 1);
      if (!longest && !shorter) {
        const int rows = OWNS_KEYS ? keys : rows_of_queries(p, queries);
        num_tiles = is_of(kind, rows) ? (rows + OWN_ROWS - 1) / OWN_ROWS : 0;
      }
    }
    tiles = warp_scan(num_tiles * num_heads(p));
  }

  // Goes on until tile `number` is among those of the 32 sequences. False past the last tile;
  // then `before` is their number.
  FC_DEVICE bool seek(const AttnParams& p, int number) {
    if (ALTERNATES && length_class < 0) return false;
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

// Tells the producer where tile `number` of a walk is; by the whole warp.
template <class Walk>
FC_DEVICE void hand_out(const AttnParams& p, const Feed& feed, const Walk& walk, int number,
                        bool found) {
  // The last rows see the most keys, the first keys are seen by the most rows.
  constexpr bool LAST_IS_LONGEST = HAS_WINDOW_RIGHT && !Walk::WALKS_ROWS;
  const int mine = number - walk.before - walk.tiles.below;  // of this lane's sequence
  if (found ? mine >= 0 && mine < walk.num_tiles * Walk::num_heads(p) : lane_idx() == 0) {
    Packet<16> coord = {};
    coord.word[2] = uint32_t(-1);
    if (found) {
      const int tile = mine % walk.num_tiles;
      coord.word[0] = uint32_t(walk.first_sequence + lane_idx());
      coord.word[1] = uint32_t(mine / walk.num_tiles);
      coord.word[2] =
          uint32_t((LAST_IS_LONGEST ? walk.num_tiles - 1 - tile : tile) * Walk::OWN_ROWS);
    }
    smem_store_packet(feed.coord, coord);
    mbar_arrive(feed.full);
  }
}

// Waits until the next tile is asked for, and draws a number; by the whole warp.
FC_DEVICE int draw_when_asked(const AttnParams& p, const Feed& feed, int count) {
  mbar_wait(feed.asked, count % 2);
  warp_sync();  // or the next phase could pass a lane that still waits
  return warp_scan(lane_idx() == 0 ? gmem_atomic_add(p.tile_counter, 1) : 0).total;
}

// Where few rows stand beside many: tiles of the two kinds in turns, until one has no more. So at
// any time some blocks read keys while others multiply.
FC_DEVICE void schedule_both_kinds(const AttnParams& p, const Feed& feed) {
  using Walk = SequenceWalk<false>;
  Walk many(p, TileKind::many_rows), few(p, TileKind::few_rows);
  int number = block_idx();
  int drawn = -1;
  for (int count = 0;; ++count) {
    const int many_before = (number + 1) / 2;  // were there enough of both
    bool is_many = many.seek(p, many_before);
    int place = number - (is_many ? many_before : many.before);
    const bool is_few = few.seek(p, place);
    if (is_many && is_few) is_many = number % 2 == 0;
    if (is_many) {
      place = is_few ? many_before : number - few.before;
      is_many = is_few || many.seek(p, place);
      hand_out(p, feed, many, place, is_many);
    } else {
      hand_out(p, feed, few, place, is_few);
    }
    if (!is_many && !is_few) break;
    drawn = draw_when_asked(p, feed, count);
    number = num_blocks() + drawn;
  }
  const int total = many.before + few.before;
  if (lane_idx() == 0 && drawn >= 0 && drawn == total - 1) {
    gmem_atomic_add(p.tile_counter, -total);
  }
}

// By the whole warp: whether there are sequences of both kinds.
FC_DEVICE bool has_both_kinds(const AttnParams& p) {
  bool has_few = false, has_many = false;
  for (int first = 0; first <= p.batch; first += 32) {
    const int sequence = first + lane_idx();
    const int queries = sequence <= p.batch ? query_rows(p, sequence).count : 0;
    const int rows = rows_of_queries(p, queries);
    has_few |= rows > 0 && is_of(TileKind::few_rows, rows);
    has_many |= is_of(TileKind::many_rows, rows);
  }
  return warp_any(has_few) && warp_any(has_many);
}

// The scheduler: the whole warp.
template <bool OWNS_KEYS = false>
FC_DEVICE void schedule_tiles(const AttnParams& p, const Feed& feed) {
  if constexpr (ALTERNATES && !OWNS_KEYS) {
    if (has_both_kinds(p)) return schedule_both_kinds(p, feed);
  }
  using Walk = SequenceWalk<OWNS_KEYS>;
  Walk walk(p, TileKind::all);
  int number = block_idx();
  int drawn = -1;
  bool found = walk.seek(p, number);
  for (int count = 0;; ++count) {
    hand_out(p, feed, walk, number, found);
    if (!found) break;
    drawn = draw_when_asked(p, feed, count);
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
template <bool OWNS_KEYS = false>
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
    const int head = int(coord.word[1]);
    const int heads_per_kv = p.num_heads_q / p.num_heads_kv;
    // The first of the heads that are one, or of the group.
    block.head_idx = OWNS_KEYS ? head * heads_per_kv : head * heads_folded(p);
    block.head_idx_kv = OWNS_KEYS ? head : block.head_idx / heads_per_kv;
    block.m_begin = int(coord.word[2]);
    ++count;
  }
};
