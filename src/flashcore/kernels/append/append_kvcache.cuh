// append_kvcache.cuh - one step's new keys and values into a cache, rotary embedding on the way.
//
// k_new and v_new go into the cache, behind what the sequence has, and q into q_rotated. Elements i
// and i + rotary_half (or 2 i and 2 i + 1, INTERLEAVED) of keys and queries are a pair (a, b) that
// turns by its position's angle (RoFormer, arXiv:2104.09864, equation 15):
//
//     a' = a cos - b sin,    b' = a sin + b cos
//
// in float32, rounded once to Element. A cache of 8 bits gets elements that count times the scale
// of their sequence and head, see append/quantise.cuh.
//
// Whatever lengths, tables and positions hold, nothing outside of the tensors is touched: a length
// counts as one in [0, capacity], a position as the nearest row of cos, and a token without room,
// or whose page does not exist, is dropped. No two threads write the same place unless two
// sequences are told to. serving/append.py does the same by PyTorch, bit for bit, and says what the
// arguments mean; read tile/pages.cuh next, which reads such a cache.
//
// The kernel is short: it waits for memory, once for each load that depends on another. So every
// thread loads what it moves before it asks where that goes, and the threads of a step's few tokens
// run all at once. A group of `1 << lanes_log2` threads moves QUERY_HEADS heads of one query, or
// the key and the value of one head of a new token; each thread two runs of each (append/runs.cuh).
#pragma once

#include "prims.cuh"
#include "append/runs.cuh"

constexpr int APPEND_WARPS = 4;  // of a block; mirrored in params.py
constexpr int QUERY_HEADS = 2;   // that a thread moves a run of; mirrored in params.py
constexpr int RUN = 8;           // elements; mirrored in params.py
constexpr bool FLOAT8_CACHE = sizeof(CacheElement) == 1;  // else CacheElement is Element

// In elements. A packed tensor has no batch dimension: its stride is 0, and all rows are of one.
struct RowStrides {
  int64_t batch, head, row, col;
};

// Mirrored by AppendParams in kernels/append/params.py, field by field.
struct AppendParams {
  GmemPtr<const Element> q, k_new, v_new;       // q null: nothing is rotated but keys
  GmemPtr<Element> q_rotated;                   // as q, contiguous
  GmemPtr<CacheElement> k_cache, v_cache;       // [num_pages, num_heads_kv, page_size, dim]
  GmemPtr<const RotaryElement> cos, sin;        // [rotary_rows, rotary_half]
  GmemPtr<const int32_t> seqlens_k;             // [batch], before
  GmemPtr<int32_t> lengths;                     // [batch], after
  GmemPtr<const int32_t> page_table;            // [batch, columns], or null: page b of sequence b
  GmemPtr<const int32_t> cu_seqlens_q, cu_seqlens_new;  // [batch + 1], or null: padded
  GmemPtr<const int32_t> offsets;               // [batch], or null: behind what the cache has
  GmemPtr<const int32_t> positions;             // of each row, or null
  GmemPtr<const float> k_scale, v_scale;        // of sequences and heads; read if FLOAT8_CACHE
  RowStrides q_strides, k_new_strides, v_new_strides, q_rotated_strides;
  RowStrides k_cache_strides, v_cache_strides;  // of pages, heads, tokens, elements
  int64_t cos_stride, sin_stride;               // from row to row; their elements are contiguous
  int64_t k_scale_batch, k_scale_head, v_scale_batch, v_scale_head;  // strides, 0 for one of all
  int32_t batch, rows_q, rows_new, seqlen_q, seqlen_new;  // seqlen_*: of padded tensors
  int32_t num_heads_q, num_heads_kv, head_dim, head_dim_v;
  int32_t page_size, num_pages, columns, table_stride;
  int32_t rotary_rows, rotary_half;
  int32_t queries;  // 0: the last query at the last new token; 1: the first at the first; 2: all
  int32_t lanes_log2;    // of the threads that share a head
  int32_t blocks_q;      // the first blocks, which move queries
  int32_t rows_have_runs;  // whether all rows can be read in runs of RUN, if their tensors begin so
};

// The sequence that a row belongs to, and its token there.
struct TokenOfRow {
  int sequence, token;
  bool is_any;  // false: a packed row of no sequence
};

FC_DEVICE int clamped(int x, int low, int high) { return min_i(max_i(x, low), high); }

FC_DEVICE int end_of(GmemPtr<const int32_t> cu_seqlens, int entry, int rows) {
  return clamped(gmem_load(cu_seqlens + entry), 0, rows);
}

FC_DEVICE TokenOfRow token_of_row(GmemPtr<const int32_t> cu_seqlens, int row, int rows, int seqlen,
                                  int batch) {
  if (is_null(cu_seqlens)) {
    const int sequence = int(uint32_t(row) / uint32_t(seqlen));
    return {sequence, row - sequence * seqlen, true};
  }
  // The number of sequences that end at or before the row, by WAYS loads at a time.
  constexpr int WAYS = 8;
  int low = 0;
  int high = batch;
  while (low < high) {
    const int step = (high - low + WAYS - 1) / WAYS;
    int passed = 0;
#pragma unroll
    for (int way = 1; way <= WAYS; ++way) {
      const int entry = min_i(low + way * step, high);
      passed += end_of(cu_seqlens, entry, rows) <= row ? 1 : 0;
    }
    low = min_i(high, low + passed * step);
    high = min_i(high, low + step - 1);
  }
  const bool is_any = low < batch && row >= end_of(cu_seqlens, 0, rows);
  const int sequence = min_i(low, batch - 1);
  return {sequence, row - end_of(cu_seqlens, sequence, rows), is_any};
}

FC_DEVICE int number_of_tokens(GmemPtr<const int32_t> cu_seqlens, int sequence, int rows,
                               int seqlen) {
  if (is_null(cu_seqlens)) return seqlen;
  return max_i(0, end_of(cu_seqlens, sequence + 1, rows) - end_of(cu_seqlens, sequence, rows));
}

FC_DEVICE int64_t offset_of(const RowStrides& strides, bool is_packed, int row, TokenOfRow at) {
  return is_packed ? row * strides.row : at.sequence * strides.batch + at.token * strides.row;
}

FC_DEVICE int tokens_before(const AppendParams& p, int sequence) {
  return clamped(gmem_load(p.seqlens_k + sequence), 0, p.columns * p.page_size);
}

// The row of cos and sin of a token that is `ahead` of its sequence's first new one.
FC_DEVICE int position_of(const AppendParams& p, int row, int sequence, int64_t ahead) {
  int64_t position;
  if (!is_null(p.positions)) {
    position = gmem_load(p.positions + row);
  } else if (!is_null(p.offsets)) {
    position = gmem_load(p.offsets + sequence) + ahead;
  } else {
    position = tokens_before(p, sequence) + ahead;
  }
  if (position < 0) return 0;
  return position < p.rotary_rows ? int(position) : p.rotary_rows - 1;
}

// Calls move(unit) for each unit of a head, two runs, that a thread moves.
template <int N, class Move>
FC_DEVICE void each_unit(const AppendParams& p, int dim, const Move& move) {
  const int lanes = 1 << p.lanes_log2;
  const int lane = thread_idx() & (lanes - 1);
  if constexpr (N > 1) {  // a head has a lane for each
    if (2 * N * lane < dim) move(lane);
  } else {
    for (int unit = lane; 2 * N * unit < dim; unit += lanes) move(unit);
  }
}

template <int N>
FC_DEVICE Angles<N> angles_at(const AppendParams& p, int position, int unit) {
  Angles<N> angles;
  angles.cos.load(p.cos + (position * p.cos_stride + unit * N));
  angles.sin.load(p.sin + (position * p.sin_stride + unit * N));
  return angles;
}

// Some heads of one query: item is the number of its row and of QUERY_HEADS heads of it.
template <int N>
FC_DEVICE void rotate_query(const AppendParams& p, uint32_t item) {
  const int several = (p.num_heads_q + QUERY_HEADS - 1) / QUERY_HEADS;
  const int row = int(item / uint32_t(several));
  if (row >= p.rows_q) return;
  const int first_head = int(item % uint32_t(several)) * QUERY_HEADS;
  const int num_heads = min_i(QUERY_HEADS, p.num_heads_q - first_head);
  const TokenOfRow at = token_of_row(p.cu_seqlens_q, row, p.rows_q, p.seqlen_q, p.batch);
  const bool is_packed = !is_null(p.cu_seqlens_q);
  const auto from = p.q + (offset_of(p.q_strides, is_packed, row, at) +
                           first_head * p.q_strides.head);
  const auto to = p.q_rotated + (offset_of(p.q_rotated_strides, is_packed, row, at) +
                                 first_head * p.q_rotated_strides.head);
  each_unit<N>(p, p.head_dim, [&](int unit) {
    const Place place = place_of<N>(unit, p.rotary_half, p.head_dim);
    Runs<N> runs[QUERY_HEADS];
#pragma unroll
    for (int h = 0; h < QUERY_HEADS; ++h) {
      const int head = min_i(h, num_heads - 1);
      runs[h].load(from + head * p.q_strides.head, p.q_strides.col, place);
    }
    if (place.turns) {
      int64_t ahead = p.queries == 2 ? 0 : at.token;
      if (p.queries == 0) {
        ahead += number_of_tokens(p.cu_seqlens_new, at.sequence, p.rows_new, p.seqlen_new);
        ahead -= number_of_tokens(p.cu_seqlens_q, at.sequence, p.rows_q, p.seqlen_q);
      }
      const Angles<N> angles = angles_at<N>(p, position_of(p, row, at.sequence, ahead), unit);
#pragma unroll
      for (int h = 0; h < QUERY_HEADS; ++h) turn(runs[h], angles);
    }
#pragma unroll
    for (int h = 0; h < QUERY_HEADS; ++h) {
      if (h < num_heads) {
        runs[h].store(to + h * p.q_rotated_strides.head, 1, place, 1.0f);
      }
    }
  });
}

FC_DEVICE float scale_at(GmemPtr<const float> scale, int64_t offset) {
  return FLOAT8_CACHE ? gmem_load(scale + offset) : 1.0f;
}

// The key and the value of one head of a new token: item is the number of its row and its head.
template <int N>
FC_DEVICE void append_token(const AppendParams& p, uint32_t item) {
  const int row = int(item / uint32_t(p.num_heads_kv));
  if (row >= p.rows_new) return;
  const int head = int(item % uint32_t(p.num_heads_kv));
  const TokenOfRow at = token_of_row(p.cu_seqlens_new, row, p.rows_new, p.seqlen_new, p.batch);
  if (!at.is_any) return;
  const bool is_packed = !is_null(p.cu_seqlens_new);
  const RowStrides& of_k = p.k_new_strides;
  const RowStrides& of_v = p.v_new_strides;
  const auto k_from = p.k_new + (offset_of(of_k, is_packed, row, at) + head * of_k.head);
  const auto v_from = p.v_new + (offset_of(of_v, is_packed, row, at) + head * of_v.head);
  each_unit<N>(p, max_i(p.head_dim, p.head_dim_v), [&](int unit) {
    const Place k_place = place_of<N>(unit, p.rotary_half, p.head_dim);
    const Place v_place = place_of<N>(unit, 0, p.head_dim_v);
    Runs<N> k, v;
    k.load(k_from, of_k.col, k_place);
    v.load(v_from, of_v.col, v_place);
    const int64_t of_k_scale = at.sequence * p.k_scale_batch + head * p.k_scale_head;
    const int64_t of_v_scale = at.sequence * p.v_scale_batch + head * p.v_scale_head;
    const float k_scale = scale_at(p.k_scale, of_k_scale);
    const float v_scale = scale_at(p.v_scale, of_v_scale);

    const uint32_t token = uint32_t(tokens_before(p, at.sequence)) + uint32_t(at.token);
    if (token >= uint32_t(p.columns) * uint32_t(p.page_size)) return;  // there is no room
    int page = at.sequence;
    const uint32_t column = token / uint32_t(p.page_size);
    if (!is_null(p.page_table)) {
      const int64_t row_of_table = int64_t(at.sequence) * p.table_stride;
      page = gmem_load(p.page_table + (row_of_table + column));
    }
    const int row_of_page = int(token - column * uint32_t(p.page_size));
    if (k_place.turns) {
      const int position = position_of(p, row, at.sequence, int64_t(at.token));
      turn(k, angles_at<N>(p, position, unit));
    }
    if (page < 0 || page >= p.num_pages) return;  // there is no such page
    const auto offset_in = [&](const RowStrides& of_cache) {
      return page * of_cache.batch + head * of_cache.head + row_of_page * of_cache.row;
    };
    k.store(p.k_cache + offset_in(p.k_cache_strides), p.k_cache_strides.col, k_place, k_scale);
    v.store(p.v_cache + offset_in(p.v_cache_strides), p.v_cache_strides.col, v_place, v_scale);
  });
}

FC_DEVICE void write_length(const AppendParams& p, int sequence) {
  const int64_t after =
      int64_t(tokens_before(p, sequence)) +
      number_of_tokens(p.cu_seqlens_new, sequence, p.rows_new, p.seqlen_new);
  const int64_t capacity = int64_t(p.columns) * p.page_size;
  gmem_store(p.lengths + sequence, int(after < capacity ? after : capacity));
}

// Returns whether all rows can be read and written in runs of RUN elements.
FC_DEVICE bool moves_runs(const AppendParams& p) {
  constexpr int IN_CACHE = RUN * int(sizeof(CacheElement));
  const int past = misalignment<16>(p.q) | misalignment<16>(p.q_rotated) |
                   misalignment<16>(p.k_new) | misalignment<16>(p.v_new) |
                   misalignment<16>(p.cos) | misalignment<16>(p.sin) |
                   misalignment<IN_CACHE>(p.k_cache) | misalignment<IN_CACHE>(p.v_cache);
  return p.rows_have_runs != 0 && past == 0;
}

template <int N>
FC_DEVICE void move_own(const AppendParams& p) {
  const bool is_query = block_idx() < p.blocks_q;
  const int block = is_query ? block_idx() : block_idx() - p.blocks_q;
  const uint32_t first = uint32_t(block) * uint32_t(APPEND_WARPS * 32 >> p.lanes_log2);
  const uint32_t item = first + uint32_t(thread_idx() >> p.lanes_log2);
  if (is_query) {
    rotate_query<N>(p, item);
  } else {
    append_token<N>(p, item);
  }
}

FC_KERNEL(append_kvcache, APPEND_WARPS * 32, 7)(FC_PARAM(AppendParams) p) {
  grid_dependency_wait();
  grid_launch_dependents();
  if (moves_runs(p)) {
    move_own<RUN>(p);
  } else {
    move_own<1>(p);
  }
  const int thread = block_idx() * (APPEND_WARPS * 32) + thread_idx();
  if (thread < p.batch) write_length(p, thread);
}
