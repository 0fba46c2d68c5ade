// fwd_sm90/float8/strips_sm90.cuh - strips of 8 query rows, as the warps of few_rows_sm90.cuh have
// them: Q in registers, bytes of K and V as operands, and the products.
//
// Little has to be exchanged, as columns may have any order that both factors agree on:
//
// - K: lane 4 r + c gets columns 4 c to 4 c + 3 of 16 of key r in one register, a product's two
//   pairs. Q's operands are loaded in that order (load_strip).
// - V: transposed, it gets columns 2 r and 2 r + 1 of keys 2 c and 2 c + 1; two bytes change
//   places. Row m of a product is column 2 m of V, or 2 (m - 8) + 1, so that a lane has columns
//   2 r and 2 r + 1 of rows 2 c and 2 c + 1.
// - P: a lane has keys r of rows 2 c and 2 c + 1, and must have the other way round (transpose8x8).
#pragma once

#include "prims_sm90.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/float8/float8_sm90.cuh"
#include "fwd_sm90/layout_sm90.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"

constexpr int STRIP_ROWS = 8;
constexpr int WARP_ROWS = STRIP_ROWS * WARP_STRIPS;
constexpr int KEY_WARPS = FEW_ROWS ? 4 * WARP_STRIPS / STRIPS : 4;  // that share the keys of rows
constexpr int WARPS_OF_ROWS = 4 / KEY_WARPS;  // with other rows each
constexpr int WARP_KEYS = FEW_ROWS ? BLOCK_N / KEY_WARPS : 32;  // of a key tile
constexpr int KEY_PAIRS = WARP_KEYS / 32;       // an accumulator has two products' results
constexpr int OUT_PAIRS = (OUT_FRAGS + 1) / 2;
static_assert(!FEW_ROWS || WARP_KEYS % 32 == 0, "pairs of 16 keys");

// The number of a warp's rows, and its own among those that share their keys.
FC_DEVICE int rows_idx() { return warp_idx() % WARPS_OF_ROWS; }
FC_DEVICE int key_warp() { return warp_idx() % 4 / WARPS_OF_ROWS; }

// 8 rows of a warp. Lane 4 r + c has rows 2 c and 2 c + 1, and of scores keys r and r + 8 of 16.
// Their `inverse` is what products must be multiplied by, as Q was multiplied: all rows share it
// unless they `differ`, see Queries in float8_sm90.cuh.
struct Strip {
  MmaB8<MathElement> queries[Q_FRAGS];
  WmmaAccum out[OUT_PAIRS];
  OnlineSoftmax softmax;
  float inverse[2];
  float scale_log2;
  bool differ;
};

struct FewRows {
  Strip strip[WARP_STRIPS];
  PipelineState state;
  bool has_max;  // of a key tile; all lanes agree
};

using StripScores = WmmaAccum[KEY_PAIRS];

// The maximum, or the sum, of the eight lanes that have the same rows.
FC_DEVICE float max_of_lanes(float x) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) x = max_f(x, shfl_xor(x, lanes));
  return x;
}

FC_DEVICE float sum_of_lanes(float x) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) x += shfl_xor(x, lanes);
  return x;
}

// Finds what to multiply a strip's Q by, of which lane 4 r + c has a part of row r. The rows'
// exponents change places as the lanes' scores want them.
FC_DEVICE float find_factor(Strip& s) {
  float largest = 0.0f;
#pragma unroll
  for (int d = 0; d < Q_FRAGS; ++d) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t bits = s.queries[d].reg[j / 2] >> j % 2 * 16;
      const float element = abs_f(to_float(Element{uint16_t(bits)}));
      largest = max_f(largest, element < -NEG_INF ? element : 0.0f);
    }
  }
  largest = quad_max(largest);
  const int of_strip = exponent_of(max_of_lanes(largest));
  const int of_row = largest == 0.0f ? of_strip : exponent_of(largest);
  s.differ = warp_any(of_strip - of_row > MAX_DIFFERENCE);
  s.inverse[0] = s.inverse[1] = power_of_two(of_strip - LARGEST_EXPONENT);
  if (!s.differ) return power_of_two(LARGEST_EXPONENT - of_strip);
  const uint32_t exponents = transpose8x8(uint32_t(of_row + 127) * 0x10001u);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    s.inverse[r] = power_of_two(int(exponents >> r * 16 & 0xffffu) - 127 - LARGEST_EXPONENT);
  }
  return power_of_two(LARGEST_EXPONENT - of_row);
}

// Q of a strip, from row `first_row` of the buffer on, as B of S^T, in the order in which
// key_operand has K's columns.
FC_DEVICE void load_strip(Strip& s, QGroup q, int first_row) {
  const int lane = opaque(lane_idx());  // or addresses that are the same for all tiles live on
  const int row = first_row + lane / 4;
  const int col = lane % 4 * 4;
#pragma unroll
  for (int d = 0; d < Q_FRAGS; ++d) {
    const auto packet = smem_load_packet<8>(q.at(row, d * 16, col) + col % 8);
    s.queries[d].reg[0] = packet.word[0];
    s.queries[d].reg[1] = packet.word[1];
  }
  s.differ = false;
  s.inverse[0] = s.inverse[1] = 1.0f;
  if (IS_FLOAT16<Element>) return;
  const float factor = find_factor(s);
#pragma unroll
  for (int d = 0; d < Q_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = s.queries[d].reg[i];
      s.queries[d].reg[i] = pack2<MathElement>(to_float(Element{uint16_t(pair)}) * factor,
                                               to_float(Element{uint16_t(pair >> 16)}) * factor);
    }
  }
}

// Where a lane's row of four matrices begins, two below each other and two to their right: of a
// tile of bytes, from row `row` and column `col`, multiples of 16, on.
template <class Tile>
FC_DEVICE auto matrix_row(Tile tile, int row, int col) {
  const int lane = lane_idx();
  const int unit = swizzled_col<Tile::ROW_BYTES>(lane % 8, (col % LOAD_CHUNK / 16 + lane / 16) * 8);
  return tile.smem + (col / LOAD_CHUNK * Tile::CHUNK_ELEMENTS + (row + lane % 16) * LOAD_CHUNK +
                      unit * 2);
}

// 16 columns of 16 keys as A of K Q^T, from the registers of eight keys each.
FC_DEVICE WmmaA<MathElement> key_operand(uint32_t first, uint32_t second) {
  uint32_t of_first[2], of_second[2];
  widen4<MathElement>(first, of_first);
  widen4<MathElement>(second, of_second);
  WmmaA<MathElement> a;
  a.reg[0] = of_first[0];
  a.reg[1] = of_second[0];
  a.reg[2] = of_first[1];
  a.reg[3] = of_second[1];
  return a;
}

// 16 columns of 16 values as A of V^T P^T, from the registers of eight values each.
FC_DEVICE WmmaA<MathElement> value_operand(uint32_t first, uint32_t second) {
  constexpr uint32_t COLUMNS_APART = 0x3120;
  uint32_t of_first[2], of_second[2];
  widen4<MathElement>(permute_bytes<COLUMNS_APART>(first, 0), of_first);
  widen4<MathElement>(permute_bytes<COLUMNS_APART>(second, 0), of_second);
  WmmaA<MathElement> a;
  a.reg[0] = of_first[0];
  a.reg[1] = of_first[1];
  a.reg[2] = of_second[0];
  a.reg[3] = of_second[1];
  return a;
}

template <class Tile>
FC_DEVICE void multiply_keys(StripScores (&scores)[WARP_STRIPS], const FewRows& c, Tile k,
                             int first_row) {
#pragma unroll
  for (int n = 0; n < KEY_PAIRS; ++n) {
#pragma unroll
    for (int s = 0; s < WARP_STRIPS; ++s) wmma_fill(scores[s][n], 0.0f);
#pragma unroll
    for (int d = 0; d < Q_FRAGS; d += 2) {
      uint32_t bytes[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ldmatrix_x4(matrix_row(k, first_row + n * 32 + h * 16, d * 16), bytes[h]);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (d + e >= Q_FRAGS) continue;
        const auto first = key_operand(bytes[0][2 * e], bytes[0][2 * e + 1]);
        const auto second = key_operand(bytes[1][2 * e], bytes[1][2 * e + 1]);
#pragma unroll
        for (int s = 0; s < WARP_STRIPS; ++s) {
          mma8_transposed<0>(scores[s][n], first, c.strip[s].queries[d + e]);
          mma8_transposed<1>(scores[s][n], second, c.strip[s].queries[d + e]);
        }
      }
    }
  }
}

template <class Tile>
FC_DEVICE void multiply_values(FewRows& c,
                               const MmaB8<MathElement> (&probs)[WARP_STRIPS][2 * KEY_PAIRS],
                               Tile v, int first_row) {
#pragma unroll
  for (int n = 0; n < 2 * KEY_PAIRS; ++n) {
#pragma unroll
    for (int d = 0; d < OUT_PAIRS; ++d) {
      uint32_t bytes[4];
      ldmatrix_x4_trans(matrix_row(v, first_row + n * 16, d * 32), bytes);
      const auto left = value_operand(bytes[0], bytes[1]);
      const auto right = value_operand(bytes[2], bytes[3]);
#pragma unroll
      for (int s = 0; s < WARP_STRIPS; ++s) {
        mma8_transposed<0>(c.strip[s].out[d], left, probs[s][n]);
        if (2 * d + 1 < OUT_FRAGS) mma8_transposed<1>(c.strip[s].out[d], right, probs[s][n]);
      }
    }
  }
}

// P of 8 rows as B of V^T P^T, 16 keys at a time.
FC_DEVICE void probs_of_scores(MmaB8<MathElement> (&probs)[2 * KEY_PAIRS],
                               const StripScores& scores) {
#pragma unroll
  for (int n = 0; n < 2 * KEY_PAIRS; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // keys r, and r + 8
      const float(&x)[8] = scores[n / 2].x;
      const int at = n % 2 * 4 + i;
      probs[n].reg[i] = transpose8x8(pack2<MathElement>(x[at], x[at + 2]));
    }
  }
}
