// append_kvcache.cuh - one step's new keys and values into a cache, rotary embedding on the way.
//
// A warp moves one head of one token: of k_new and v_new into the cache, behind what the sequence
// has, and of q into q_rotated. Elements i and i + rotary_half (or 2 i and 2 i + 1, INTERLEAVED) of
// keys and queries are a pair (a, b) that turns by its position's angle (RoFormer,
// arXiv:2104.09864, equation 15):
//
//     a' = a cos - b sin,    b' = a sin + b cos
//
// in float32, rounded once to Element. A cache of 8 bits gets elements that count times the scale
// of their sequence and head, see append/quantise.cuh.
//
// Whatever lengths, tables and positions hold, nothing outside of the tensors is touched: a length
// counts as one in [0, capacity], a position as the nearest row of cos, and a token without room,
// or whose page does not exist, is dropped. No two warps write the same place unless two sequences
// are told to. serving/append.py does the same by PyTorch, bit for bit, and says what the arguments
// mean; read tile/pages.cuh next, which reads such a cache.
#pragma once

#include "prims.cuh"
#include "append/quantise.cuh"

constexpr int APPEND_WARPS = 4;  // of a block; mirrored in params.py
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
  if (is_null(cu_seqlens)) return {row / seqlen, row % seqlen, true};
  // The number of sequences that end at or before the row.
  int low = 0;
  int high = batch;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (end_of(cu_seqlens, middle + 1, rows) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
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

FC_DEVICE int64_t offset_of(const RowStrides& strides, GmemPtr<const int32_t> cu_seqlens, int row,
                            int seqlen, int head) {
  const int64_t rows = is_null(cu_seqlens)
                           ? (row / seqlen) * strides.batch + (row % seqlen) * strides.row
                           : row * strides.row;
  return rows + head * strides.head;
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

// a * b, rounded: written as an instruction that adds -0, it cannot become one with a later
// addition, which would round only once. The -0 is hidden, or the compiler would undo that.
FC_DEVICE float product(float a, float b) {
  return fma_rn(a, b, from_packet<float>(Packet<4>{{uint32_t(opaque(int(0x80000000u)))}}));
}

// A value as an element of a tensor of T.
template <class T>
FC_DEVICE T element_of(Element x, float scale) {
  if constexpr (sizeof(T) == 1) {
    return quantised(to_float(x), scale);
  } else {
    return x;
  }
}

// Move one head of one token; the first 2 `half` elements turn by the angles of a position.
template <class T>
FC_DEVICE void move(const AppendParams& p, GmemPtr<const Element> from, int64_t from_col,
                    GmemPtr<T> to, int64_t to_col, int dim, int half, int position, float scale) {
  for (int i = lane_idx(); i < half; i += 32) {
    const int first = INTERLEAVED ? 2 * i : i;
    const int second = INTERLEAVED ? 2 * i + 1 : i + half;
    const float a = to_float(gmem_load(from + first * from_col));
    const float b = to_float(gmem_load(from + second * from_col));
    const float c = to_float(gmem_load(p.cos + (position * p.cos_stride + i)));
    const float s = to_float(gmem_load(p.sin + (position * p.sin_stride + i)));
    const Element turned[2] = {from_float<Element>(product(a, c) - product(b, s)),
                               from_float<Element>(product(a, s) + product(b, c))};
    gmem_store(to + first * to_col, element_of<T>(turned[0], scale));
    gmem_store(to + second * to_col, element_of<T>(turned[1], scale));
  }
  for (int i = 2 * half + lane_idx(); i < dim; i += 32) {
    gmem_store(to + i * to_col, element_of<T>(gmem_load(from + i * from_col), scale));
  }
}

FC_DEVICE void rotate_query(const AppendParams& p, int row, int head) {
  const TokenOfRow at = token_of_row(p.cu_seqlens_q, row, p.rows_q, p.seqlen_q, p.batch);
  int64_t ahead = p.queries == 2 ? 0 : at.token;
  if (p.queries == 0) {
    ahead += number_of_tokens(p.cu_seqlens_new, at.sequence, p.rows_new, p.seqlen_new);
    ahead -= number_of_tokens(p.cu_seqlens_q, at.sequence, p.rows_q, p.seqlen_q);
  }
  move(p, p.q + offset_of(p.q_strides, p.cu_seqlens_q, row, p.seqlen_q, head), p.q_strides.col,
       p.q_rotated + offset_of(p.q_rotated_strides, p.cu_seqlens_q, row, p.seqlen_q, head), 1,
       p.head_dim, p.rotary_half, position_of(p, row, at.sequence, ahead), 1.0f);
}

FC_DEVICE void append_token(const AppendParams& p, int row, int head, bool is_key) {
  const TokenOfRow at = token_of_row(p.cu_seqlens_new, row, p.rows_new, p.seqlen_new, p.batch);
  if (!at.is_any) return;
  const int64_t place = int64_t(tokens_before(p, at.sequence)) + at.token;
  if (place >= int64_t(p.columns) * p.page_size) return;  // there is no room
  int page = at.sequence;
  if (!is_null(p.page_table)) {
    const int64_t row_of_table = int64_t(at.sequence) * p.table_stride;
    page = gmem_load(p.page_table + (row_of_table + place / p.page_size));
  }
  if (page < 0 || page >= p.num_pages) return;  // there is no such page
  const RowStrides& to = is_key ? p.k_cache_strides : p.v_cache_strides;
  const int64_t to_offset =
      page * to.batch + head * to.head + (place % p.page_size) * to.row;
  float scale = 1.0f;
  if constexpr (FLOAT8_CACHE) {
    const int64_t k_offset = at.sequence * p.k_scale_batch + head * p.k_scale_head;
    const int64_t v_offset = at.sequence * p.v_scale_batch + head * p.v_scale_head;
    scale = gmem_load(is_key ? p.k_scale + k_offset : p.v_scale + v_offset);
  }
  if (is_key) {
    const int64_t from = offset_of(p.k_new_strides, p.cu_seqlens_new, row, p.seqlen_new, head);
    const int position =
        p.rotary_half == 0 ? 0 : position_of(p, row, at.sequence, int64_t(at.token));
    move(p, p.k_new + from, p.k_new_strides.col, p.k_cache + to_offset, to.col, p.head_dim,
         p.rotary_half, position, scale);
  } else {
    const int64_t from = offset_of(p.v_new_strides, p.cu_seqlens_new, row, p.seqlen_new, head);
    move(p, p.v_new + from, p.v_new_strides.col, p.v_cache + to_offset, to.col, p.head_dim_v, 0, 0,
         scale);
  }
}

FC_DEVICE void write_length(const AppendParams& p, int sequence) {
  const int64_t after =
      int64_t(tokens_before(p, sequence)) +
      number_of_tokens(p.cu_seqlens_new, sequence, p.rows_new, p.seqlen_new);
  const int64_t capacity = int64_t(p.columns) * p.page_size;
  gmem_store(p.lengths + sequence, int(after < capacity ? after : capacity));
}

FC_KERNEL(append_kvcache, APPEND_WARPS * 32, 1)(const AppendParams p) {
  const int thread = block_idx() * (APPEND_WARPS * 32) + thread_idx();
  if (thread < p.batch) write_length(p, thread);
  // Heads of tokens: of q, then of keys, then of values.
  int64_t item = int64_t(block_idx()) * APPEND_WARPS + warp_idx();
  const int64_t num_q = is_null(p.q) ? 0 : int64_t(p.rows_q) * p.num_heads_q;
  if (item < num_q) {
    rotate_query(p, int(item / p.num_heads_q), int(item % p.num_heads_q));
    return;
  }
  item -= num_q;
  const int64_t num_new = int64_t(p.rows_new) * p.num_heads_kv;
  if (item >= 2 * num_new) return;
  const bool is_key = item < num_new;
  if (!is_key) item -= num_new;
  append_token(p, int(item / p.num_heads_kv), int(item % p.num_heads_kv), is_key);
}
