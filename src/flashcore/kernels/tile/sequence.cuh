// tile/sequence.cuh - sequences of different lengths in one launch: which rows of the tensors a
// block's sequence has, and the parameters as that sequence sees them.
//
// Lengths are read on the device, where nobody has checked them, so they are clamped: whatever they
// are, no sequence reaches outside of the tensors.
#pragma once

#include "prims.cuh"
#include "tile/folded_rows.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"

// Tensors are [total, num_heads, HEAD_DIM]; sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1].
// With VARLEN 4 queries are, and keys lie in pages.
constexpr bool PACKED = VARLEN == 1 || VARLEN == 4;
// Tensors are as ever; sequence b has the first seqlens_k[b] keys.
constexpr bool KEY_LENGTHS = VARLEN >= 2;
// Likewise, but keys and values lie in pages, see tile/pages.cuh.
constexpr bool PAGED = VARLEN >= 3;

FC_DEVICE int clamp_i(int x, int low, int high) { return max_i(low, min_i(x, high)); }

struct RowRange {
  int begin;
  int count;
};

// A kernel's tiles are of queries, or, where it OWNS_KEYS, of keys. Whichever they are, the rows
// behind the last sequence count as one more, number `batch`, which has nothing of the other kind.
FC_DEVICE RowRange sequence_rows(const AttnParams& p, GmemPtr<const int32_t> cu_seqlens,
                                 int sequence, int total) {
  const int begin = clamp_i(gmem_load(cu_seqlens + sequence), 0, total);
  int end = total;
  if (sequence < p.batch) end = clamp_i(gmem_load(cu_seqlens + (sequence + 1)), 0, total);
  return {begin, max_i(0, end - begin)};
}

template <bool OWNS_KEYS = false>
FC_DEVICE RowRange query_rows(const AttnParams& p, int sequence) {
  if (OWNS_KEYS && sequence == p.batch) return {0, 0};
  return sequence_rows(p, p.lengths.cu_seqlens_q, sequence, p.lengths.total_q);
}

template <bool OWNS_KEYS = false>
FC_DEVICE RowRange key_rows(const AttnParams& p, int sequence) {
  if (!OWNS_KEYS && sequence == p.batch) return {0, 0};
  if (PAGED) return {0, clamp_i(gmem_load(p.lengths.seqlens_k + sequence), 0, p.seqlen_k)};
  return sequence_rows(p, p.lengths.cu_seqlens_k, sequence, p.lengths.total_k);
}

static_assert(!FLOAT8 || KEY_LENGTHS, "8-bit caches come with lengths");
// A scale below this counts as this: what multiplies scores must not be 0.
constexpr float SMALLEST_SCALE = 1e-30f;

// Takes the scales of a sequence's 8-bit keys and values, of one head, into the parameters.
FC_DEVICE void take_scales(AttnParams& own, const BlockCoord& block) {
  const Scales& s = own.scales;
  const int64_t sequence = min_i(block.batch_idx, own.batch - 1);  // of rows behind the last one
  const float of_k = gmem_load(
      s.k_scale + (sequence * s.k_scale_batch + int64_t(block.head_idx_kv) * s.k_scale_head));
  own.softmax_scale *= max_f(of_k, SMALLEST_SCALE);
  own.softmax_scale_log2 *= max_f(of_k, SMALLEST_SCALE);
  own.scales.v_factor = gmem_load(
      s.v_scale + (sequence * s.v_scale_batch + int64_t(block.head_idx_kv) * s.v_scale_head));
}

// Returns the key at which the tree of a packed sequence begins. One with more queries than trees
// have rows has none: no key tile is reached.
FC_DEVICE int tree_begin(const AttnParams& p, int num_queries, int num_keys) {
  return num_queries > p.lengths.tree_size ? 0x7fffffff : num_keys - num_queries;
}

// The parameters as one sequence sees them: its lengths, its part of packed tensors, its scales.
// Without VARLEN the parameters themselves.
template <int KIND = VARLEN, bool OWNS_KEYS = false>
FC_DEVICE decltype(auto) sequence_params(const AttnParams& p, const BlockCoord& block) {
  if constexpr (KIND == 0) {
    return (p);
  } else {
    AttnParams own = p;
    if constexpr (PACKED) {
      const RowRange queries = query_rows<OWNS_KEYS>(p, block.batch_idx);
      const RowRange keys = key_rows<OWNS_KEYS>(p, block.batch_idx);
      own.seqlen_q = queries.count;
      own.seqlen_k = keys.count;
      own.tensors.q = p.tensors.q + int64_t(queries.begin) * p.strides.q.row;
      own.tensors.k = p.tensors.k + int64_t(keys.begin) * p.strides.k.row;
      own.tensors.v = p.tensors.v + int64_t(keys.begin) * p.strides.v.row;
      own.tensors.out = p.tensors.out + int64_t(queries.begin) * p.num_heads_q * HEAD_DIM_V;
      if (!is_null(p.tensors.lse)) own.tensors.lse = p.tensors.lse + queries.begin;
    } else {
      own.seqlen_k = clamp_i(gmem_load(p.lengths.seqlens_k + block.batch_idx), 0, p.seqlen_k);
    }
    if constexpr (FLOAT8) take_scales(own, block);
    const int num_queries = FOLDED && !PACKED ? p.num_queries : own.seqlen_q;
    own.band.diag_offset = p.lengths.lower_right ? own.seqlen_k - num_queries : 0;
    if constexpr (PACKED && MASK_KIND == 3) {
      own.band.tree_begin = tree_begin(p, num_queries, own.seqlen_k);
    }
    if constexpr (FOLDS_PACKED) own.seqlen_q = rows_of_queries(p, num_queries);
    return own;
  }
}

// Where TMA finds row 0 of a block's sequence: coordinates in the maps of
// kernels/fwd_sm90/params.py, in which a box ends where the sequence ends.
struct BoxOrigin {
  int row, batch;
};

template <bool OWNS_KEYS = false>
FC_DEVICE BoxOrigin query_box(const AttnParams& p, const BlockCoord& block) {
  if (!PACKED) return {0, block.batch_idx};
  const RowRange rows = query_rows<OWNS_KEYS>(p, block.batch_idx);
  return {p.lengths.total_q - rows.count, rows.begin + rows.count};
}

template <bool OWNS_KEYS = false>
FC_DEVICE BoxOrigin key_box(const AttnParams& p, const BlockCoord& block, int rows_per_batch) {
  if (VARLEN == 0) return {0, block.batch_idx};
  if (PACKED) {
    const RowRange rows = key_rows<OWNS_KEYS>(p, block.batch_idx);
    return {p.lengths.total_k - rows.count, rows.begin + rows.count};
  }
  const int count = clamp_i(gmem_load(p.lengths.seqlens_k + block.batch_idx), 0, p.seqlen_k);
  return {p.seqlen_k - count, block.batch_idx * rows_per_batch + count};
}

// Where a query row of a block's head lies in the sequence's lse; and in its out, in elements.
FC_DEVICE int64_t lse_offset(const AttnParams& p, const BlockCoord& block, int row) {
  if (FOLDS_PACKED) {
    return int64_t(block.head_idx + head_of(p, row)) * p.lengths.total_q + query_of(p, row);
  }
  if (PACKED) return int64_t(block.head_idx) * p.lengths.total_q + row;
  return (int64_t(block.batch_idx) * p.num_heads_q + block.head_idx) * p.seqlen_q + row;
}

FC_DEVICE int out_row_stride(const AttnParams& p) {
  return PACKED ? p.num_heads_q * HEAD_DIM_V : HEAD_DIM_V;
}

FC_DEVICE int64_t out_offset(const AttnParams& p, const BlockCoord& block, int row) {
  if (FOLDS_PACKED) {
    const int head = block.head_idx + head_of(p, row);
    return int64_t(query_of(p, row)) * out_row_stride(p) + head * HEAD_DIM_V;
  }
  if (PACKED) return int64_t(row) * out_row_stride(p) + block.head_idx * HEAD_DIM_V;
  return lse_offset(p, block, row) * HEAD_DIM_V;
}

// A packed sequence's row tiles of one head are numbered without knowing the other sequences'
// lengths: sequence b starts at number begin / BLOCK_M + b, which leaves it as many numbers as it
// has tiles, or one more.
FC_DEVICE int first_tile_number(const AttnParams& p, int sequence) {
  const int total = p.lengths.total_q;
  const int begin = sequence > p.batch
                        ? total
                        : clamp_i(gmem_load(p.lengths.cu_seqlens_q + sequence), 0, total);
  return begin / BLOCK_M + sequence;
}

// The tile of a number in [0, num_heads_q * first_tile_number(batch + 1)), sequence by sequence and
// head by head; m_begin is -1 where a number has no tile.
FC_DEVICE BlockCoord packed_block_coord(const AttnParams& p, int number) {
  int sequence = 0;  // first_tile_number(sequence) <= number / heads < first_tile_number(end)
  int end = p.batch + 1;
  while (end - sequence > 1) {
    const int middle = sequence + (end - sequence) / 2;
    const bool left = number < first_tile_number(p, middle) * p.num_heads_q;
    sequence = left ? sequence : middle;
    end = left ? middle : end;
  }
  const int first = first_tile_number(p, sequence);
  const int num_tiles = first_tile_number(p, sequence + 1) - first;
  const int rest = number - first * p.num_heads_q;
  BlockCoord coord = {sequence, 0, 0, -1};
  if (rest < 0) return coord;  // before the first sequence
  coord.head_idx = rest / num_tiles;
  coord.head_idx_kv = coord.head_idx / (p.num_heads_q / p.num_heads_kv);
  const int tile = rest % num_tiles;
  // Under a right bound the longest tiles come first, in the order of block_coord.
  const int m_begin = (HAS_WINDOW_RIGHT ? num_tiles - 1 - tile : tile) * BLOCK_M;
  if (m_begin < query_rows(p, sequence).count) coord.m_begin = m_begin;
  return coord;
}

// The row tile of a block of the portable kernel.
FC_DEVICE BlockCoord row_tile(const AttnParams& p, int number) {
  return PACKED ? packed_block_coord(p, number) : block_coord(p, number);
}
