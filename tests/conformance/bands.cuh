// Which key tiles rows see, which query tiles see keys, where a tile needs a mask, and which scores
// a lane of S and of S^T may see: of a case a block, of one warp, TILES tiles to either side.
#pragma once

#include "prims.cuh"
#include "tile/band.cuh"
#include "tile/params.cuh"

struct BandsParams {
  GmemPtr<const int32_t> cases;  // [num_cases, 5]: seqlen_q, seqlen_k, diag_offset, left, right
  GmemPtr<int32_t> ranges;       // [num_cases, TILES, 3, 2]: of key_tiles, unmasked, query_tiles
  GmemPtr<int32_t> hides;        // [num_cases, TILES, TILES]: of rows, of keys
  GmemPtr<int32_t> seen;         // [num_cases, TILES * ROWS, TILES * KEYS]
  GmemPtr<int32_t> seen_by;      // [num_cases, TILES * KEYS, TILES * ROWS]
  int32_t num_queries;
};

FC_DEVICE void store_range(GmemPtr<int32_t> to, Range range) {
  gmem_store(to, range.begin);
  gmem_store(to + 1, range.end);
}

template <bool TRANSPOSED, int LINES, int COLUMNS>
FC_DEVICE void store_visible(GmemPtr<int32_t> to, const AttnParams& p) {
  for (int line = 0; line < LINES; line += 16) {
    for (int column = 0; column < COLUMNS; column += 32) {
      const VisibleColumns<TRANSPOSED> visible(p, line, column);
      for (int i = 0; i < 16; ++i) {
        const int col = column + i / 8 * 16 + accum_col(lane_idx(), i % 8);
        const auto place = to + ((line + accum_row(lane_idx(), i % 8)) * COLUMNS + col);
        gmem_store(place, visible.contain(i / 8, i % 8) ? 1 : 0);
      }
    }
  }
}

FC_KERNEL(bands, 32, 1)(const BandsParams params) {
  const auto told = params.cases + block_idx() * 5;
  AttnParams p = {};
  p.seqlen_q = gmem_load(told);
  p.seqlen_k = gmem_load(told + 1);
  p.band = {gmem_load(told + 2), gmem_load(told + 3), gmem_load(told + 4)};
  p.num_queries = params.num_queries;
  for (int tile = lane_idx(); tile < TILES; tile += 32) {
    const auto ranges = params.ranges + (block_idx() * TILES + tile) * 6;
    store_range(ranges, key_tiles<ROWS, KEYS>(p, tile * ROWS));
    store_range(ranges + 2, unmasked_key_tiles<ROWS, KEYS>(p, tile * ROWS));
    store_range(ranges + 4, query_tiles<KEYS, ROWS>(p, tile * KEYS));
    for (int other = 0; other < TILES; ++other) {
      const bool hides = window_hides_some<ROWS, KEYS>(p, tile * ROWS, other * KEYS);
      gmem_store(params.hides + ((block_idx() * TILES + tile) * TILES + other), hides ? 1 : 0);
    }
  }
  constexpr int SIZE = TILES * ROWS * TILES * KEYS;
  store_visible<false, TILES * ROWS, TILES * KEYS>(params.seen + block_idx() * SIZE, p);
  store_visible<true, TILES * KEYS, TILES * ROWS>(params.seen_by + block_idx() * SIZE, p);
}
