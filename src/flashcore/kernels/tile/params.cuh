// tile/params.cuh - what one launch is told. Mirrored by kernels/fwd_wmma/params.py, group by group
// and field by field. No two groups have a field of the same name but for strides, so that Python
// names an address by its field alone.
#pragma once

#include "prims.cuh"

// Another tensor that a kernel reads or writes gets its address here and in `Tensors` of params.py.
struct Tensors {
  GmemPtr<const Element> q;         // [batch, num_heads_q, seqlen_q, HEAD_DIM]
  GmemPtr<const CacheElement> k;    // [batch, num_heads_kv, seqlen_k, HEAD_DIM]
  GmemPtr<const CacheElement> v;    // [batch, num_heads_kv, seqlen_k, HEAD_DIM_V]
  GmemPtr<const MaskElement> mask;  // [batch, num_heads_q, seqlen_q, seqlen_k], or null
  GmemPtr<Element> out;             // [batch, num_heads_q, seqlen_q, HEAD_DIM_V], contiguous
  GmemPtr<float> lse;               // [batch, num_heads_q, seqlen_q], contiguous, or null
  GmemPtr<const float> sinks;       // [num_heads_q], natural log; read only under HAS_SINKS
};

// In elements; the last dimension of q, k and v is contiguous.
struct TensorStrides {
  int64_t batch, head;
  int32_t row;
};

struct MaskStrides {
  int64_t batch, head, row, col;
};

struct Strides {
  TensorStrides q, k, v;
  MaskStrides mask;
};

// Query i sees key j iff i + diag_offset - window_left <= j <= i + diag_offset + window_right.
struct Band {
  int32_t diag_offset, window_left, window_right;
  int32_t tree_begin;  // of packed queries: the key that a tree's column 0 is of, sequence_params
};

// Sequences of different lengths; read only under VARLEN, see tile/sequence.cuh.
struct Lengths {
  GmemPtr<const int32_t> cu_seqlens_q, cu_seqlens_k;  // [batch + 1]
  GmemPtr<const int32_t> seqlens_k;                   // [batch]
  int32_t total_q, total_k;
  int32_t lower_right;  // 1: a sequence's last query sees its last key; 0: diagonal at (0, 0)
  // Of the Hopper kernel, see tile/schedule_varlen.cuh and kernels/fwd_sm90/params.py.
  int32_t max_tiles, num_length_classes;
  int32_t k_rows_per_batch, v_rows_per_batch;  // from one batch, or page, to the next
  int32_t tree_size;  // of packed queries' trees; a sequence of more queries has none
};

// Partial results of rows whose keys are split over blocks, see tile/shares.cuh; under
// STREAM_K [slots, rows of a slot, ...], see tile/stream_k.cuh.
struct Splits {
  GmemPtr<float> split_out;    // [shares, batch, num_heads_q, seqlen_q, padded HEAD_DIM_V]
  GmemPtr<float> split_stats;  // [shares, batch, num_heads_q, seqlen_q, 2]: row_max, row_sum
  int32_t num_splits;
  int32_t most_polls;  // for others' shares, of groups that add up together; 0: the last one does
  int32_t num_lines, heads_of_line;  // heads side by side, and after one another: num_heads_q
  int32_t num_ranges;   // of a line
  int32_t least_tiles;  // key tiles of a block's range at least; of a piece under FIXED_PIECES
  float adding_up;      // what a share costs to add up, in key tiles
};

// A cache in pages; read only under PAGED, see tile/pages.cuh.
struct Pages {
  GmemPtr<const int32_t> page_table;  // [batch, max_pages]
  int32_t page_table_stride;          // from one sequence's row to the next one's, in entries
  int32_t num_pages;
};

// The scales of 8-bit caches, value = element * scale; read only under FLOAT8.
struct Scales {
  GmemPtr<const float> k_scale, v_scale;  // of each sequence and head of k and v
  int32_t k_scale_batch, k_scale_head, v_scale_batch, v_scale_head;  // strides, 0 for one of all
  float v_factor;  // v's of a block's own sequence and head, see sequence_params
};
//@if gate

struct Gate {
  GmemPtr<float> gate_scores;   // [batch, num_heads_q, seqlen_q, seqlen_k]
  GmemPtr<float> gate_row_max;  // [batch, num_heads_q, seqlen_q, num_n_blocks]
  GmemPtr<float> gate_row_sum;  // [batch, num_heads_q, seqlen_q, num_n_blocks]
};
//@end

// Sizes and scalars, which nearly every function reads, are in no group. What every kernel reads
// comes first and lies together: the first read of each 64 bytes costs a block a miss.
struct AttnParams {
  Tensors tensors;

  int32_t batch, num_heads_q, num_heads_kv, seqlen_q, seqlen_k;
  // Of a head; seqlen_q rows are more where heads are folded (folding.py). Of packed queries, whose
  // numbers only the device knows: how many heads are folded (tile/folded_rows.cuh).
  int32_t num_queries;
  int32_t num_m_blocks;

  float softmax_scale;       // of q.k, natural units
  float softmax_scale_log2;  // softmax_scale * log2(e): the kernel exponentiates with exp2
  float softcap;             // in natural units; read only under HAS_SOFTCAP

  Band band;
  Strides strides;
  Lengths lengths;
  Splits splits;
  GmemPtr<int32_t> tile_counter;  // one, or one a row tile; 0 between launches
  Pages pages;
  Scales scales;
  GmemPtr<float> max_score;  // [batch, num_heads_q], -inf at the start; see tile/max_score.cuh
//@if gate
  Gate gate;
//@end
};
