// tile/params.cuh - what one launch is told. Mirrored by AttnParams in kernels/fwd_wmma/params.py,
// field by field.
#pragma once

struct AttnParams {
  GmemPtr<const Element> q;         // [batch, num_heads_q, seqlen_q, HEAD_DIM]
  GmemPtr<const Element> k;         // [batch, num_heads_kv, seqlen_k, HEAD_DIM]
  GmemPtr<const Element> v;         // [batch, num_heads_kv, seqlen_k, HEAD_DIM_V]
  GmemPtr<const MaskElement> mask;  // [batch, num_heads_q, seqlen_q, seqlen_k], or null
  GmemPtr<Element> out;             // [batch, num_heads_q, seqlen_q, HEAD_DIM_V], contiguous
  GmemPtr<float> lse;               // [batch, num_heads_q, seqlen_q], contiguous, or null

  // Strides in elements; the last dimension of q, k and v is contiguous.
  int64_t q_batch_stride, q_head_stride;
  int64_t k_batch_stride, k_head_stride;
  int64_t v_batch_stride, v_head_stride;
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride, mask_col_stride;
  int32_t q_row_stride, k_row_stride, v_row_stride;

  int32_t num_heads_q, num_heads_kv, seqlen_q, seqlen_k, num_m_blocks;

  // Query i sees key j iff i + diag_offset - window_left <= j <= i + diag_offset + window_right.
  int32_t diag_offset, window_left, window_right;

  float softmax_scale;       // of q.k, natural units
  float softmax_scale_log2;  // softmax_scale * log2(e): the kernel exponentiates with exp2
  float softcap;             // in natural units; read only under HAS_SOFTCAP

  // Read only under VARLEN, see tile/sequence.cuh.
  GmemPtr<const int32_t> cu_seqlens_q, cu_seqlens_k;  // [batch + 1]
  GmemPtr<const int32_t> seqlens_k;                   // [batch]
  int32_t batch, total_q, total_k;
  int32_t lower_right;  // 1: a sequence's last query sees its last key; 0: diagonal at (0, 0)

  // Of the Hopper kernel, see tile/schedule_varlen.cuh and kernels/fwd_sm90/params.py.
  int32_t max_tiles, num_length_classes;
  int32_t k_rows_per_batch, v_rows_per_batch;  // from one batch to the next
  GmemPtr<int32_t> tile_counter;               // one, or one a row tile; 0 between launches

  // Shares of rows whose keys are split over blocks, see fwd_sm90/split_sm90.cuh.
  GmemPtr<float> split_out;    // [num_splits, batch, num_heads_q, seqlen_q, padded HEAD_DIM_V]
  GmemPtr<float> split_stats;  // [num_splits, batch, num_heads_q, seqlen_q, 2]: row_max, row_sum
  int32_t num_splits;

  // Of a head; seqlen_q rows are more where heads are folded (problem/folding.py).
  int32_t num_queries;
//@if gate

  GmemPtr<float> gate_scores;   // [batch, num_heads_q, seqlen_q, seqlen_k]
  GmemPtr<float> gate_row_max;  // [batch, num_heads_q, seqlen_q, num_n_blocks]
  GmemPtr<float> gate_row_sum;  // [batch, num_heads_q, seqlen_q, num_n_blocks]
//@end
};
