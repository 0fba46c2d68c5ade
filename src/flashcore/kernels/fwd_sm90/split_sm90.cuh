// fwd_sm90/split_sm90.cuh - keys of a row tile that blocks share, as many splits of each as the
// host says, and those that consumers of a block share, a slice of the key tiles each.
//
// Blocks hand over and add up their shares in tile/shares.cuh. The slices of a block have maxima of
// their own, m1 and m2. With m = max(m1, m2), sums and outputs of slice s count exp(ms - m) times.
// A slice that saw no key has m = -inf and counts nothing.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"

// The pieces of a row tile come side by side; row tiles are in the order of block_coord.
struct SplitWalk {
  int piece = block_idx();

  FC_DEVICE static int num_pieces(const AttnParams& p, const TileSchedule& schedule) {
    return schedule.num_heads * p.num_m_blocks * p.splits.num_splits;
  }

  FC_DEVICE bool done(const AttnParams& p, const TileSchedule& schedule) const {
    return piece >= num_pieces(p, schedule);
  }

  FC_DEVICE BlockCoord coord(const AttnParams& p, const TileSchedule& schedule) const {
    const int num_splits = p.splits.num_splits;
    const int row_tile = piece / num_splits;
    BlockCoord block = block_coord(p, row_tile);
    block.split = piece - row_tile * num_splits;
    block.is_last = piece + num_blocks() >= num_pieces(p, schedule);
    const Range keys = key_tiles(sequence_params(p, block), block.m_begin);
    const int num_tiles = keys.end - keys.begin;
    const int at_least = num_tiles / num_splits;
    const int one_more = num_tiles - at_least * num_splits;  // so many pieces, the first ones
    block.tile_begin = block.split * at_least + min_i(block.split, one_more);
    block.tile_end = block.tile_begin + at_least + (block.split < one_more ? 1 : 0);
    return block;
  }

  FC_DEVICE void ask(const AttnParams&, const TileSchedule&) {}
  FC_DEVICE void advance(const AttnParams&, const TileSchedule&) { piece += num_blocks(); }
};

// True where the place of a block's first piece takes nothing but the launch's parameters: a thread
// that has no other part in the set-up finds it, as divisions take longer than the rest of that.
constexpr bool KNOWS_FIRST_PIECE = SPLIT_KV && !STREAM_K && VARLEN == 0 && !FLOAT8;
constexpr int PLACING_THREAD = 32;

FC_DEVICE void place_first_piece(const AttnParams& p, const TileSchedule& schedule,
                                 SmemPtr<int32_t> coords) {
  if (!KNOWS_FIRST_PIECE || thread_idx() != PLACING_THREAD) return;
  store_coord(coord_slot(coords, 0), SplitWalk().coord(p, schedule));
}

// Bytes that say whether a warpgroup was the last of its rows, one int for each group of rows.
constexpr int ARRIVAL_BYTES = SPLIT_KV ? 16 : 0;
static_assert(!SPLIT_KV || NUM_ROW_GROUPS <= 4, "no room for more");

// Packets of partial results that a thread has under way at once, for it is their latency that
// counts: as many as registers hold, of which a mask takes some, and so does a wide O.
constexpr bool FEWER_PACKETS =
    MASK_KIND != 0 || STREAM_K || HEAD_DIM_V > 128 || CONSUMER_REGISTERS < 240;
constexpr int PARTIAL_PACKETS = CONSUMER_REGISTERS < 128 && FEW_ROWS ? 8
                                : CONSUMER_REGISTERS < 224             ? 16
                                : FEWER_PACKETS                        ? 24
                                                                       : 32;

// A consumer hands this over: O and the state of the softmax, 128 threads' registers.
template <int NUM_OUT_FRAGS>
constexpr int SLICE_FLOATS = (NUM_OUT_FRAGS * 8 + 4) * 128;

// Consumer 0 (`slice` 0) goes on with the sum; the others hand over theirs and have nothing left.
// `turn` counts row tiles. Every thread arrives: compute-sanitizer does not see that one lane may
// arrive for a warp, nor what bar.arrive orders.
template <int NUM_OUT_FRAGS>
FC_DEVICE void merge_slices(int slice, int turn, OnlineSoftmax& softmax,
                            WmmaAccum (&out)[NUM_OUT_FRAGS], const Barriers& bar,
                            SmemPtr<float> merge_smem, float scale_log2) {
  constexpr int FLOATS = SLICE_FLOATS<NUM_OUT_FRAGS>;
  const int thread = thread_idx() % 128;
  if (slice > 0) {
    const auto mine = merge_smem + ((slice - 1) * FLOATS + thread);
    mbar_wait(bar.merge_empty, turn % 2 ^ 1);  // of the last row tile's
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      smem_store(mine + r * 128, softmax.row_max[r]);
      smem_store(mine + (r + 2) * 128, softmax.row_sum[r]);
    }
#pragma unroll
    for (int i = 0; i < NUM_OUT_FRAGS * 8; ++i) {
      smem_store(mine + (i + 4) * 128, out[i / 8].x[i % 8]);
    }
    mbar_arrive(bar.merge_full);
    return;
  }
  mbar_wait(bar.merge_full, turn % 2);
  float weight[KEY_SLICES][2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float own_max = softmax.row_max[r];
#pragma unroll
    for (int s = 1; s < KEY_SLICES; ++s) {
      const float their_max = smem_load(merge_smem + ((s - 1) * FLOATS + r * 128 + thread));
      softmax.row_max[r] = max_f(softmax.row_max[r], their_max);
    }
    const float finite_max = softmax.row_max[r] == NEG_INF ? 0.0f : softmax.row_max[r];
    weight[0][r] = exp2_approx((own_max - finite_max) * scale_log2);
    softmax.row_sum[r] *= weight[0][r];
#pragma unroll
    for (int s = 1; s < KEY_SLICES; ++s) {
      const auto theirs = merge_smem + ((s - 1) * FLOATS + thread);
      weight[s][r] = exp2_approx((smem_load(theirs + r * 128) - finite_max) * scale_log2);
      softmax.row_sum[r] += weight[s][r] * smem_load(theirs + (r + 2) * 128);
    }
  }
#pragma unroll
  for (int i = 0; i < NUM_OUT_FRAGS * 8; ++i) {
    float& sum = out[i / 8].x[i % 8];
    sum *= weight[0][row_of_element(i % 8)];
#pragma unroll
    for (int s = 1; s < KEY_SLICES; ++s) {
      sum += weight[s][row_of_element(i % 8)] *
             smem_load(merge_smem + ((s - 1) * FLOATS + (i + 4) * 128 + thread));
    }
  }
  mbar_arrive(bar.merge_empty);
}
