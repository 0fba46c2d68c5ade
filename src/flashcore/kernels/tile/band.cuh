// tile/band.cuh - the band of scores that attention computes: which key tiles some rows see, which
// query tiles see some keys, and where a tile needs a mask; whatever the sizes of tiles.
//
// Query i sees key j iff i + diag_offset - window_left <= j <= i + diag_offset + window_right,
// so key j is seen by query i iff j - diag_offset - window_right <= i and i <= j - diag_offset +
// window_left, the same band mirrored. Therefore everything is said once, of lines and the columns
// that they see: of queries and keys, or, of S^T, of keys and queries.
#pragma once

#include "prims.cuh"
#include "tile/folded_rows.cuh"
#include "tile/params.cuh"

constexpr bool IS_BOUNDED = HAS_WINDOW_LEFT || HAS_WINDOW_RIGHT;

// Lines, columns or tiles [begin, end).
struct Range {
  int begin, end;
};

// Of a block's tiles those in `own`; where there are none, an empty range at the block's first.
FC_DEVICE Range part_of(const Range& block, Range own) {
  own = {max_i(own.begin, block.begin), min_i(own.end, block.end)};
  return own.begin < own.end ? own : Range{block.begin, block.begin};
}

// The band as S has it or, TRANSPOSED, as S^T has it: which columns lines see.
template <bool TRANSPOSED = false>
struct BandOf {
  static constexpr bool HAS_LEFT = TRANSPOSED ? HAS_WINDOW_RIGHT : HAS_WINDOW_LEFT;
  static constexpr bool HAS_RIGHT = TRANSPOSED ? HAS_WINDOW_LEFT : HAS_WINDOW_RIGHT;

  const AttnParams& p;

  FC_DEVICE int num_lines() const { return TRANSPOSED ? p.seqlen_k : p.seqlen_q; }
  FC_DEVICE int num_columns() const { return TRANSPOSED ? p.seqlen_q : p.seqlen_k; }
  FC_DEVICE int left() const { return TRANSPOSED ? p.band.window_right : p.band.window_left; }
  FC_DEVICE int right() const { return TRANSPOSED ? p.band.window_left : p.band.window_right; }
  // Of a line: the column on the diagonal, and the first and the last one in the window.
  FC_DEVICE int diagonal(int line) const {
    return TRANSPOSED ? line - p.band.diag_offset : line + p.band.diag_offset;
  }
  FC_DEVICE int first_column(int line) const { return diagonal(line) - left(); }
  FC_DEVICE int last_column(int line) const { return diagonal(line) + right(); }

  // The tiles of SIZE columns that some of lines `first` to `last` see, of which `first` exists.
  template <int SIZE>
  FC_DEVICE Range tiles_seen_by_some(int first, int last) const {
    int begin = 0;
    int end = num_columns();
    if (HAS_LEFT) begin = max_i(0, first_column(first));
    if (HAS_RIGHT) end = min_i(end, last_column(min_i(last, num_lines() - 1)) + 1);
    if (begin >= end) return {0, 0};
    return {begin / SIZE, (end + SIZE - 1) / SIZE};
  }

  // The tiles of SIZE columns all of which each of lines `first` to `last` sees.
  template <int SIZE>
  FC_DEVICE Range tiles_seen_by_all(int first, int last) const {
    int end = num_columns();
    if (HAS_RIGHT) end = min_i(end, last_column(first) + 1);
    Range tiles = {0, max_i(end, 0) / SIZE};
    if (HAS_LEFT) {
      const int begin = max_i(0, first_column(last));
      tiles.begin = min_i(tiles.end, (begin + SIZE - 1) / SIZE);
    }
    return tiles;
  }
};

// The queries among rows [row_begin, row_begin + count), of which the first exists. Of padded
// queries whose heads are FOLDED the rows of one tile may be any (tile/folded_rows.cuh).
struct QueryRange {
  int first, last;
};

FC_DEVICE QueryRange queries_of(const AttnParams& p, int row_begin, int count) {
  if (FOLDS_PACKED) {
    const int last_row = min_i(row_begin + count, p.seqlen_q) - 1;
    return {query_of(p, row_begin), query_of(p, last_row)};
  }
  if (FOLDED) return {0, p.num_queries - 1};
  return {row_begin, row_begin + count - 1};
}

// The key tiles that hold every key which some of ROWS rows can see.
template <int ROWS = BLOCK_M, int KEYS = BLOCK_N>
FC_DEVICE Range key_tiles(const AttnParams& p, int row_begin) {
  const QueryRange queries = queries_of(p, row_begin, ROWS);
  return BandOf<>{p}.tiles_seen_by_some<KEYS>(queries.first, queries.last);
}

// The key tiles that hold only keys which all of ROWS rows can see.
template <int ROWS, int KEYS = BLOCK_N>
FC_DEVICE Range unmasked_key_tiles(const AttnParams& p, int row_begin) {
  const QueryRange queries = queries_of(p, row_begin, ROWS);
  return BandOf<>{p}.tiles_seen_by_all<KEYS>(queries.first, queries.last);
}

// Of a block's key tiles, those that ROWS of its rows need.
template <int ROWS>
FC_DEVICE Range own_key_tiles(const AttnParams& p, const Range& block, int row_begin) {
  Range own = {0, 0};
  if (row_begin < p.seqlen_q) own = key_tiles<ROWS>(p, row_begin);
  return part_of(block, own);
}

// The query tiles that hold every query which sees some of KEYS keys.
template <int KEYS = BLOCK_N, int ROWS = BLOCK_M>
FC_DEVICE Range query_tiles(const AttnParams& p, int key_begin) {
  if (key_begin >= p.seqlen_k) return {0, 0};
  return BandOf<true>{p}.tiles_seen_by_some<ROWS>(key_begin, key_begin + KEYS - 1);
}

// Of a block's query tiles, those that KEYS of its keys need; without a bound all.
template <int KEYS>
FC_DEVICE Range own_query_tiles(const AttnParams& p, const Range& block, int key_begin) {
  if (!IS_BOUNDED) return block;
  return part_of(block, query_tiles<KEYS>(p, key_begin));
}

// Returns whether the window hides some of KEYS keys from some of ROWS rows; all lanes agree.
template <int ROWS, int KEYS>
FC_DEVICE bool window_hides_some(const AttnParams& p, int row_begin, int key_begin) {
  const QueryRange queries = queries_of(p, row_begin, ROWS);
  const BandOf<> band = {p};
  bool hides = false;
  if (HAS_WINDOW_RIGHT) hides |= key_begin + KEYS - 1 > band.last_column(queries.first);
  if (HAS_WINDOW_LEFT) hides |= key_begin < band.first_column(queries.last);
  return hides;
}

// Returns whether the window lets some of ROWS rows see keys from `key_begin` on; all lanes agree.
template <int ROWS>
FC_DEVICE bool window_reaches(const AttnParams& p, int row_begin, int key_begin) {
  const QueryRange queries = queries_of(p, row_begin, ROWS);
  return !HAS_WINDOW_RIGHT || key_begin <= BandOf<>{p}.last_column(queries.last);
}

// The columns that a lane's two of a warp's 16 lines see, counted from the lane's first column
// so that a compare takes a constant: two registers, or three or four where the bounds of the
// second line are not 8 further than those of the first: because heads are FOLDED, or as S ends
// where the sequence's keys do. (Queries behind the last one have no probability in any case.)
template <bool TRANSPOSED = false>
struct VisibleColumns {
  using Bounds = BandOf<TRANSPOSED>;
  static constexpr bool HAS_END = !TRANSPOSED;
  static constexpr int NUM_BEGINS = FOLDED ? 2 : 1;
  static constexpr int NUM_ENDS = FOLDED || HAS_END ? 2 : 1;

  int begin[NUM_BEGINS], end[NUM_ENDS];

  FC_DEVICE VisibleColumns(const AttnParams& p, int line_begin, int column_begin) {
    const Bounds band = {p};
    const int lane = opaque(lane_idx());  // or what depends on it alone lives on between key tiles
    const int first_line = line_begin + accum_row(lane, 0);
    const int first_col = column_begin + accum_col(lane, 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int line = first_line + accum_row(0, r * 2);
      const int diagonal = band.diagonal(TRANSPOSED ? line : query_of(p, line));
      if (r < NUM_BEGINS) begin[r] = diagonal - band.left() - first_col;
      if (r < NUM_ENDS) {
        end[r] = HAS_END ? band.num_columns() : diagonal + band.right() + 1;
        if (HAS_END && Bounds::HAS_RIGHT) end[r] = min_i(end[r], diagonal + band.right() + 1);
        end[r] -= first_col;
      }
    }
  }

  // Element i of fragment n.
  FC_DEVICE bool contain(int n, int i) const {
    const int r = i % 4 / 2;
    const int col = n * 16 + accum_col(0, i);
    const int past_begin = NUM_BEGINS == 2 ? col : col - accum_row(0, i);
    const int past_end = NUM_ENDS == 2 ? col : col - accum_row(0, i);
    return (!Bounds::HAS_LEFT || past_begin >= begin[r % NUM_BEGINS]) &&
           (!(HAS_END || Bounds::HAS_RIGHT) || past_end < end[r % NUM_ENDS]);
  }
};
