// fwd_wmma/totals_wmma.cuh - sums over very many keys, one chunk after the other.
//
// Tensor cores cut off what an accumulator has no bits for, each time that they add 16 products to
// it: half a last place on average, so that a sum of n such steps, all alike, is short of n * 2^-25
// of itself: one part in 40 after 19 million keys. Sums in row_sum round to nearest, but of terms
// all alike each may round the same way. So every KEY_TILES_OF_CHUNK key tiles O and row_sum are
// added to totals and begin anew: then neither a chunk's steps nor the chunks are many. The totals
// lie in local memory, as registers are taken; a chunk is long. An index that the compiler cannot
// see through keeps them there. (Where the Hopper kernel's keys are that many, blocks share them.)
#pragma once

#include "prims.cuh"
#include "tile/softmax.cuh"

// 0: the keys are so few that one sum will do (problem/exactness.py).
constexpr bool HAS_TOTALS = KEY_TILES_OF_CHUNK > 0;
constexpr int CHUNK_KEY_TILES = HAS_TOTALS ? KEY_TILES_OF_CHUNK : 1;  // 0 would be divided by

// Of one warp's 16 rows, as a lane holds them in accumulators and in OnlineSoftmax.
template <int NUM_OUT_FRAGS, bool EXISTS = HAS_TOTALS>
class Totals {
 public:
  // Returns whether the key tile is the last of its chunk.
  FC_DEVICE static bool ends_chunk(int n_block) {
    return n_block % CHUNK_KEY_TILES == CHUNK_KEY_TILES - 1;
  }

  // Moves a chunk's sums here; the caller clears O.
  FC_DEVICE void add(OnlineSoftmax& state, const WmmaAccum (&out)[NUM_OUT_FRAGS],
                     float scale_log2) {
    const int first = opaque(0);
    float factor[2];  // takes the totals from their row_max to the new one
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float old_max = num_chunks == 0 ? NEG_INF : row_max[first + r];
      const float old_sum = num_chunks == 0 ? 0.0f : row_sum[first + r];
      const float finite_max = state.row_max[r] == NEG_INF ? 0.0f : state.row_max[r];
      factor[r] = exp2_approx((old_max - finite_max) * scale_log2);
      row_sum[first + r] = old_sum * factor[r] + state.row_sum[r];
      row_max[first + r] = state.row_max[r];
      state.row_sum[r] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < NUM_OUT_FRAGS; ++d) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float old_sum = num_chunks == 0 ? 0.0f : sums[first + d * 8 + i];
        sums[first + d * 8 + i] = old_sum * factor[row_of_element(i)] + out[d].x[i];
      }
    }
    ++num_chunks;
  }

  // Gives the totals back, with those of the last chunk, as though there had been one sum.
  FC_DEVICE void end(OnlineSoftmax& state, WmmaAccum (&out)[NUM_OUT_FRAGS], float scale_log2) {
    if (num_chunks == 0) return;
    add(state, out, scale_log2);
    const int first = opaque(0);
#pragma unroll
    for (int r = 0; r < 2; ++r) state.row_sum[r] = row_sum[first + r];
#pragma unroll
    for (int d = 0; d < NUM_OUT_FRAGS; ++d) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[d].x[i] = sums[first + d * 8 + i];
    }
  }

 private:
  int num_chunks = 0;
  float sums[NUM_OUT_FRAGS * 8];
  float row_sum[2], row_max[2];
};

template <int NUM_OUT_FRAGS>
class Totals<NUM_OUT_FRAGS, false> {
 public:
  FC_DEVICE static bool ends_chunk(int) { return false; }
  FC_DEVICE void add(OnlineSoftmax&, const WmmaAccum (&)[NUM_OUT_FRAGS], float) {}
  FC_DEVICE void end(OnlineSoftmax&, WmmaAccum (&)[NUM_OUT_FRAGS], float) {}
};
