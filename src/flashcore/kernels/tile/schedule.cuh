// tile/schedule.cuh - which query rows a block computes, and which key tiles they can see.
#pragma once

#include "prims.cuh"
#include "tile/params.cuh"

struct BlockCoord {
  int batch_idx;
  int head_idx;     // of q
  int head_idx_kv;  // of k and v: num_heads_q / num_heads_kv query heads share one
  int m_begin;      // first query row
  int split = 0;    // the part of the row tile's keys, see fwd_sm90/split_sm90.cuh
  // Under STREAM_K alone, see tile/stream_k.cuh.
  int num_splits = 1;              // of the row tile
  int tile_begin = 0, tile_end = 0;  // of the piece, counted from the row tile's first key tile
  int first_slot = 0;              // of the row tile's first share
};

// What persistent blocks are told of the order of tiles, see fwd_sm90/schedule_sm90.cuh.
struct TileSchedule {
  int32_t num_heads;          // num_heads_q * batch
  int32_t heads_per_section;  // of the last section maybe more; read only under a right bound
};

// The heads of a block, from batch_idx * num_heads_q + head_idx; m_begin is left open.
FC_DEVICE BlockCoord head_coord(const AttnParams& p, int head_and_batch) {
  BlockCoord coord;
  coord.head_idx = head_and_batch % p.num_heads_q;
  coord.batch_idx = head_and_batch / p.num_heads_q;
  coord.head_idx_kv = coord.head_idx / (p.num_heads_q / p.num_heads_kv);
  return coord;
}

// Row tiles vary fastest, so that blocks running side by side share K and V in L2. Under a right
// bound (causal) later rows see more keys: the longest tiles start first.
FC_DEVICE BlockCoord block_coord(const AttnParams& p, int tile) {
  const int m_block = tile % p.num_m_blocks;
  BlockCoord coord = head_coord(p, tile / p.num_m_blocks);
  coord.m_begin = (HAS_WINDOW_RIGHT ? p.num_m_blocks - 1 - m_block : m_block) * BLOCK_M;
  return coord;
}

// The queries among rows [row_begin, row_begin + count). Under pack-GQA (FOLDED) row r is query
// r % num_queries of some head, so the rows of one tile may be any of the queries.
struct QueryRange {
  int first, last;
};

FC_DEVICE QueryRange queries_of(const AttnParams& p, int row_begin, int count) {
  if (FOLDED) return {0, p.num_queries - 1};
  return {row_begin, row_begin + count - 1};
}

FC_DEVICE int query_of(const AttnParams& p, int row) { return FOLDED ? row % p.num_queries : row; }

// Key tiles [n_block_begin, n_block_end) hold every key that some of `num_rows` rows from `m_begin`
// on can see.
struct KeyRange {
  int n_block_begin;
  int n_block_end;
};

FC_DEVICE KeyRange key_range(const AttnParams& p, int m_begin, int num_rows = BLOCK_M) {
  const QueryRange queries = queries_of(p, m_begin, num_rows);
  int first_key = 0;
  int end_key = p.seqlen_k;
  if (HAS_WINDOW_LEFT) {
    first_key = max_i(0, queries.first + p.band.diag_offset - p.band.window_left);
  }
  if (HAS_WINDOW_RIGHT) {
    const int last = min_i(queries.last, p.seqlen_q - 1);
    end_key = min_i(end_key, last + p.band.diag_offset + p.band.window_right + 1);
  }
  if (first_key >= end_key) return {0, 0};
  return {first_key / BLOCK_N, (end_key + BLOCK_N - 1) / BLOCK_N};
}

// Of a block's key tiles, those that 64 of its rows from `row_begin` on need.
FC_DEVICE KeyRange group_key_range(const AttnParams& p, const KeyRange& block, int row_begin) {
  KeyRange own = {0, 0};
  if (row_begin < p.seqlen_q) own = key_range(p, row_begin, 64);
  own.n_block_begin = max_i(own.n_block_begin, block.n_block_begin);
  own.n_block_end = min_i(own.n_block_end, block.n_block_end);
  if (own.n_block_begin < own.n_block_end) return own;
  return {block.n_block_begin, block.n_block_begin};
}

// Key tiles [begin, end) hold only keys that all of 64 rows from `row_begin` on can see.
struct UnmaskedRange {
  int begin;
  int end;
};

FC_DEVICE UnmaskedRange unmasked_range(const AttnParams& p, int row_begin) {
  const QueryRange queries = queries_of(p, row_begin, 64);
  int end_key = p.seqlen_k;
  if (HAS_WINDOW_RIGHT) {
    end_key = min_i(end_key, queries.first + p.band.diag_offset + p.band.window_right + 1);
  }
  UnmaskedRange range = {0, max_i(end_key, 0) / BLOCK_N};
  if (HAS_WINDOW_LEFT) {
    const int first_key = max_i(0, queries.last + p.band.diag_offset - p.band.window_left);
    range.begin = min_i(range.end, (first_key + BLOCK_N - 1) / BLOCK_N);
  }
  return range;
}
