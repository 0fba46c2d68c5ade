// merge/merge_rows.cuh - rows of two results of attention: who computes which, and their shares.
//
// LANES lanes of a warp have a row, WIDTH elements at a time each. A row's results over two sets of
// keys weigh (FlashAttention-2, arXiv:2307.08691, section 3.1)
//
//   share_a = 1 / (1 + exp(lse_b - lse_a))    share_b = 1 / (1 + exp(lse_a - lse_b))
//
// A side whose lse is -inf has attended to nothing: whatever stands there, NaN too, has no part.
// Rows are numbered over batch, head and row; leading dimensions that there are not have size 1.
// Mirrored by kernels/merge/params.py.
#pragma once

#include "prims.cuh"

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;
constexpr int MERGE_WARPS = 4;  // of a block
constexpr int ROWS_OF_BLOCK = MERGE_WARPS * 32 / LANES;

struct MergeStrides {
  int64_t batch, head, row;  // in elements
};

struct MergeSides {
  GmemPtr<const ElementA> out_a;
  GmemPtr<const ElementB> out_b;
  GmemPtr<const float> lse_a, lse_b;
  MergeStrides out_a_strides, out_b_strides, lse_a_strides, lse_b_strides;
  int32_t num_rows, num_heads, rows_of_head, dim;
};

// A row, and the first element of a lane in it.
struct MergeRow {
  int index, batch, head, row, col;
  bool exists;
};

FC_DEVICE MergeRow own_row(const MergeSides& p) {
  MergeRow at;
  at.index = block_idx() * ROWS_OF_BLOCK + thread_idx() / LANES;
  at.exists = at.index < p.num_rows;
  if (!at.exists) at.index = p.num_rows - 1;  // such a lane helps to add up, and writes nothing
  at.row = at.index % p.rows_of_head;
  at.head = at.index / p.rows_of_head % p.num_heads;
  at.batch = at.index / p.rows_of_head / p.num_heads;
  at.col = thread_idx() % LANES * WIDTH;
  return at;
}

FC_DEVICE int64_t offset_of(const MergeRow& at, const MergeStrides& strides) {
  return at.batch * strides.batch + at.head * strides.head + at.row * strides.row;
}

struct Shares {
  float a, b;
  float lse;
  bool has_a, has_b;
};

FC_DEVICE Shares shares_of(const MergeSides& p, const MergeRow& at) {
  const float lse_a = gmem_load(p.lse_a + offset_of(at, p.lse_a_strides));
  const float lse_b = gmem_load(p.lse_b + offset_of(at, p.lse_b_strides));
  Shares shares = {0.0f, 0.0f, NEG_INF, lse_a != NEG_INF, lse_b != NEG_INF};
  if (!shares.has_a && !shares.has_b) return shares;
  const float ahead = lse_a == lse_b ? 0.0f : lse_a - lse_b;  // infinity - infinity is NaN
  shares.a = rcp_approx(1.0f + exp2_approx(-ahead * LOG2_E));
  shares.b = rcp_approx(1.0f + exp2_approx(ahead * LOG2_E));
  const float larger = ahead < 0.0f ? lse_b : lse_a;
  shares.lse = larger + log2_approx(1.0f + exp2_approx(-abs_f(ahead) * LOG2_E)) * LN_2;
  return shares;
}

// WIDTH elements in float32, and back.
template <class T>
FC_DEVICE void load_values(float (&x)[WIDTH], GmemPtr<const T> from) {
  if constexpr (WIDTH == 1) {
    x[0] = to_float(gmem_load(from));
  } else {
    constexpr int IN_PACKET = 16 / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if (i % IN_PACKET != 0) continue;
      const auto packet = gmem_load_packet<16>(from + i);
#pragma unroll
      for (int j = 0; j < IN_PACKET; ++j) {
        if constexpr (sizeof(T) == 4) {
          x[i + j] = to_float(from_packet<T>(Packet<4>{{packet.word[j]}}));
        } else {
          const uint32_t word = packet.word[j / 2];
          const uint32_t bits = j % 2 == 0 ? word & 0xffffu : word >> 16;
          x[i + j] = to_float(from_packet<T>(Packet<2>{{bits}}));
        }
      }
    }
  }
}

template <class T>
FC_DEVICE void store_values(GmemPtr<T> to, const float (&x)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    gmem_store(to, from_float<T>(x[0]));
  } else {
    constexpr int IN_PACKET = 16 / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if (i % IN_PACKET != 0) continue;
      Packet<16> packet;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          packet.word[j] = to_packet(from_float<T>(x[i + j])).word[0];
        } else {
          packet.word[j] = pack2<T>(x[i + 2 * j], x[i + 2 * j + 1]);
        }
      }
      gmem_store_packet(to + i, packet);
    }
  }
}

// The elements of a side from a column on, 0 where it has attended to nothing.
template <class T>
FC_DEVICE void load_side(float (&x)[WIDTH], GmemPtr<const T> row, int col, bool has) {
  load_values(x, row + col);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) x[i] = has ? x[i] : 0.0f;
}
