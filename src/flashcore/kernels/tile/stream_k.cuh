// tile/stream_k.cuh - stream-K: equal parts of the work, whatever the lengths of sequences.
//
// Only the device knows the lengths, and where rows are few, key tiles are all the work there is.
// Think of the key tiles of all row tiles in one line, sequence by sequence and head by head. It is
// cut into ranges of equal length, one a block, across the borders of heads and sequences. A block
// takes its range in pieces, each of one row tile. At most two of them are a row tile's part: the
// first and the last one. So there are two slots a block for shares of a result, whatever the
// lengths, and a counter a block: a row tile that is cut counts where its first share was made.
//
// Heads often lie side by side in memory, and are read faster where they are read at the same time.
// So there are `num_lines` lines, all alike, each with every num_lines-th head: blocks that follow
// one another take the same range of one line after the other.
//
// Nothing but the lengths and the number of blocks decides where cuts are, and shares are added in
// the order of keys: a call's result is the same bit for bit each time.
//
// PACKED sequences have as many row tiles as their queries fill; the rows behind the last sequence
// are one more, which sees no key.
//
// Under FIXED_PIECES (batch-invariant calls) a row tile is cut every `least_tiles` key tiles, so
// that its sequence alone decides what is added to what. A block takes the pieces that begin in its
// range. Shares have the places that the host's splits have, split by split.
#pragma once

#include "prims.cuh"
#include "tile/band.cuh"
#include "tile/folded_rows.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"

// Returns the slot of a row tile's share. The first share is made by the block that the row tile
// begins in: in that block's second slot, unless its range begins there, too.
FC_DEVICE int slot_of(const AttnParams& p, const BlockCoord& block, int split) {
  return split == 0 ? block.first_slot : (block.first_slot / 2 + split * p.splits.num_lines) * 2;
}

// The block that a row tile begins in.
FC_DEVICE int first_block_of(const BlockCoord& block) { return block.first_slot / 2; }

// The pieces of a block's range. A line has its heads of a row tile one after the other. A row tile
// without keys counts as one key tile: somebody must write its zeros. An item is a row tile, and of
// PACKED sequences all row tiles of one.
struct StreamWalk {
  int place = 0, end = 0;  // where in the line the next piece begins, and the range ends
  int range_tiles = 0;     // of a range
  int item = 0, head = 0;  // of the next piece, the head by its number in the line
  int m_block = 0;         // of the next piece, among the row tiles of its item
  int first = 0;           // where in the line its row tile begins
  int num_tiles = 0;       // of that row tile

  static_assert(!PACKED || !FIXED_PIECES, "shares of packed sequences have places in slots alone");

  FC_DEVICE static int num_items(const AttnParams& p) {
    return PACKED ? p.batch + 1 : p.batch * p.num_m_blocks;
  }

  FC_DEVICE static BlockCoord item_coord(const AttnParams& p, int item, int m_block) {
    if (PACKED) return {item, 0, 0, m_block * BLOCK_M};
    return {item / p.num_m_blocks, 0, 0, item % p.num_m_blocks * BLOCK_M};
  }

  // Tells `take` each row tile of an item from number `m_block` on, and its key tiles, until it
  // returns false.
  template <class Take>
  FC_DEVICE static void each_row_tile(const AttnParams& p, int item, int m_block,
                                      const Take& take) {
    const BlockCoord first = item_coord(p, item, 0);
    const auto& own = sequence_params(p, first);
    const int count = PACKED ? (own.seqlen_q + BLOCK_M - 1) / BLOCK_M : 1;
    for (; m_block < count; ++m_block) {
      const Range keys = key_tiles(own, item_coord(p, item, m_block).m_begin);
      if (!take(m_block, max_i(1, keys.end - keys.begin))) return;
    }
  }

  // x of the one lane that `has` it.
  FC_DEVICE static int of_lane(bool has, int x) { return warp_scan(has ? x : 0).total; }

  // The number of the block's range in its line, and the line's number.
  FC_DEVICE static int range_idx(const AttnParams& p) { return block_idx() / p.splits.num_lines; }
  FC_DEVICE static int line_idx(const AttnParams& p) { return block_idx() % p.splits.num_lines; }

  // By the whole warp. Each lane looks at as many items, which follow one another.
  FC_DEVICE explicit StreamWalk(const AttnParams& p) {
    const int items_of_lane = (num_items(p) + 31) / 32;
    const int first_item = min_i(num_items(p), lane_idx() * items_of_lane);
    const int end_item = min_i(num_items(p), first_item + items_of_lane);
    const int heads = p.splits.heads_of_line;
    // Of packed sequences that do not overlap, in one head.
    const int most = PACKED ? p.lengths.max_tiles / (heads * p.splits.num_lines) : 0;
    int sum = 0, longest = 0, count = 0;
    for (int i = first_item; i < end_item; ++i) {
      each_row_tile(p, i, 0, [&](int, int tiles) {
        sum += tiles;
        longest = max_i(longest, tiles);
        return !PACKED || ++count <= most;
      });
    }
    if (PACKED && warp_scan(min_i(count, most + 1)).total > most) return;  // sums may be too large
    const WarpScan line = warp_scan(sum * heads);
    set_range(p, line.total, longest);
    place = min_i(line.total, range_idx(p) * range_tiles);
    end = min_i(line.total, place + range_tiles);
    const bool is_here = place >= line.below && place < line.below + sum * heads;
    int begin = line.below;
    bool is_found = !is_here;
    for (item = first_item; !is_found; item += is_found ? 0 : 1) {
      each_row_tile(p, item, 0, [&](int row_tile, int tiles) {
        m_block = row_tile;
        num_tiles = tiles;
        is_found = place < begin + tiles * heads;
        if (!is_found) begin += tiles * heads;
        return !is_found;
      });
    }
    item = of_lane(is_here, item);
    if (PACKED) m_block = of_lane(is_here, m_block);
    num_tiles = max_i(1, of_lane(is_here, num_tiles));
    first = of_lane(is_here, begin);
    head = (place - first) / num_tiles;
    first += head * num_tiles;
    if (!FIXED_PIECES || place >= end) return;
    const int piece = p.splits.least_tiles;
    place = first + (place - first + piece - 1) / piece * piece;
    if (place >= first + num_tiles) next_row_tile(p);
  }

  // Ranges as long as give each block one, but no shorter than `least_tiles`; and where one SM adds
  // up many shares, longer: n tiles in ranges of r give n / r shares, and r + adding_up * n / r is
  // least where r is the root of adding_up * n.
  FC_DEVICE void set_range(const AttnParams& p, int total, int longest) {
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) longest = max_i(longest, shfl_xor(longest, bit));
    const int num_ranges = p.splits.num_ranges;
    range_tiles = max_i(p.splits.least_tiles, (total + num_ranges - 1) / num_ranges);
    const float square = p.splits.adding_up * float(longest);
    while (range_tiles < longest && float(range_tiles) * float(range_tiles) < square) ++range_tiles;
  }

  // Between pieces a walk may lie in shared memory, where it takes no registers.
  static constexpr int INTS = PACKED ? 8 : 7;

  FC_DEVICE void keep(SmemPtr<int32_t> to) const {
    const int fields[8] = {place, end, range_tiles, item, head, first, num_tiles, m_block};
#pragma unroll
    for (int i = 0; i < INTS; ++i) smem_store(to + i, fields[i]);
  }

  FC_DEVICE explicit StreamWalk(SmemPtr<int32_t> from)
      : place(smem_load(from)),
        end(smem_load(from + 1)),
        range_tiles(smem_load(from + 2)),
        item(smem_load(from + 3)),
        head(smem_load(from + 4)),
        first(smem_load(from + 5)),
        num_tiles(smem_load(from + 6)) {
    if (PACKED) m_block = smem_load(from + 7);
  }

  FC_DEVICE bool done(const AttnParams&, const TileSchedule&) const { return place >= end; }

  FC_DEVICE BlockCoord coord(const AttnParams& p, const TileSchedule&) const {
    BlockCoord block = item_coord(p, item, m_block);
    block.head_idx = (head * p.splits.num_lines + line_idx(p)) * heads_folded(p);
    block.head_idx_kv = block.head_idx / (p.num_heads_q / p.num_heads_kv);
    block.tile_begin = place - first;
    if (FIXED_PIECES) {
      const int piece = p.splits.least_tiles;
      block.tile_end = min_i(block.tile_begin + piece, num_tiles);
      block.split = block.tile_begin / piece;
      block.num_splits = (num_tiles + piece - 1) / piece;
      return block;
    }
    block.tile_end = min_i(end, first + num_tiles) - first;
    const int first_range = first / range_tiles;
    block.split = range_idx(p) - first_range;
    block.num_splits = (first + num_tiles - 1) / range_tiles - first_range + 1;
    const int first_block = first_range * p.splits.num_lines + line_idx(p);
    block.first_slot = first_block * 2 + (first % range_tiles == 0 ? 0 : 1);
    return block;
  }

  FC_DEVICE void ask(const AttnParams&, const TileSchedule&) {}

  FC_DEVICE void advance(const AttnParams& p, const TileSchedule&) {
    if (FIXED_PIECES) {
      place += p.splits.least_tiles;
      if (place < first + num_tiles) return;
    }
    next_row_tile(p);  // a piece that ends sooner is the last one
  }

  FC_DEVICE void next_row_tile(const AttnParams& p) {
    first += num_tiles;
    place = first;
    if (place >= end || ++head < p.splits.heads_of_line) return;
    head = 0;
    num_tiles = 0;
    const auto take = [&](int row_tile, int tiles) {
      m_block = row_tile;
      num_tiles = tiles;
      return false;
    };
    if (PACKED) each_row_tile(p, item, m_block + 1, take);
    while (num_tiles == 0) each_row_tile(p, ++item, 0, take);
  }
};
