// tile/shares.cuh - the keys of a row tile shared by blocks, where row tiles are fewer than SMs or
// rows so few that reading K and V is all there is to do.
//
// A block takes pieces: a row tile and one of num_splits runs of its key tiles. It writes a partial
// O with its row_max and row_sum to global memory, only the rows that exist. A counter tells the
// group of four warps (64 rows) that hands over a row tile's last part: it adds up all parts, in
// the order of the splits, so that the result does not depend on which group it is.
//
// Of many large parts the groups add up together. Each waits until all parts are there, and adds up
// a slice of the row tile: 1 / num_splits of it, from all parts. But not for ever, as blocks need
// not run at the same time: a group leaves after `most_polls` looks at the counter, or at once if
// its block has another piece to take, and says so there. The counter is final when it has counted
// the last part; it then says how many have left, and the others take larger slices. A warp adds up
// 16 columns of a row, always in the same order, whoever it is.
#pragma once

#include "prims.cuh"
#include "tile/band.cuh"
#include "tile/folded_rows.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/softmax.cuh"
#include "tile/stream_k.cuh"

constexpr int GROUPS_OF_TILE = (BLOCK_M + 63) / 64;  // that own 64 rows each, or fewer
// True where blocks may add up shares together; others have no registers for that and would spill.
// Mirrored by may_add_up_together in kernels/fwd_sm90/splits.py.
constexpr bool HAS_OPTIONS = MASK_KIND != 0 || HAS_SOFTCAP || IS_BOUNDED || RETURNS_MAX_SCORE;
constexpr bool MAY_ADD_UP_TOGETHER =
    SPLIT_KV && !STREAM_K && !FLOAT8 && (!HAS_OPTIONS || (MIN_BLOCKS == 1 && HEAD_DIM_V <= 128));

// Rows that a slot has room for: of packed sequences each has its own number.
FC_DEVICE int rows_of_slot(const AttnParams& p) {
  return PACKED ? BLOCK_M : min_i(BLOCK_M, p.seqlen_q);
}

// The key tiles of a block's piece; of the whole row tile unless SPLIT_KV.
FC_DEVICE Range own_keys(const AttnParams& p, const BlockCoord& block) {
  const Range keys = key_tiles(p, block.m_begin);
  if (!SPLIT_KV) return keys;
  return {keys.begin + block.tile_begin, min_i(keys.end, keys.begin + block.tile_end)};
}

FC_DEVICE Packet<8> pair_of(float first, float second) {
  return {{to_packet(first).word[0], to_packet(second).word[0]}};
}

FC_DEVICE int num_splits_of(const AttnParams& p, const BlockCoord& block) {
  return STREAM_K ? block.num_splits : p.splits.num_splits;
}

// Where a split's part of a row lies, counted in rows.
FC_DEVICE int64_t partial_row(const AttnParams& p, const BlockCoord& block, int split, int row) {
  if (STREAM_K && !FIXED_PIECES) {
    return int64_t(slot_of(p, block, split)) * rows_of_slot(p) + (row - block.m_begin);
  }
  const int64_t num_rows = int64_t(p.batch) * p.num_heads_q * p.seqlen_q;
  return split * num_rows + lse_offset(p, block, row);
}

// Writes a warp's 16 rows of O, row_max and row_sum; not yet divided.
template <int NUM_OUT_FRAGS>
FC_DEVICE void store_partial(const AttnParams& p, const BlockCoord& block, int warp_row,
                           const OnlineSoftmax& softmax, const WmmaAccum (&out)[NUM_OUT_FRAGS]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(softmax.row_sum[r]);
    const int row = warp_row + accum_row(lane_idx(), r * 2);
    if (!is_row(p, row)) continue;
    const int64_t at = partial_row(p, block, block.split, row);
    if (lane_idx() % 4 == 0) {
      gmem_store_packet(p.splits.split_stats + at * 2, pair_of(softmax.row_max[r], sum));
    }
    // Columns behind HEAD_DIM_V too: were accumulators dead, ptxas would serialise WGMMA.
    const auto to = p.splits.split_out + (at * (NUM_OUT_FRAGS * 16) + accum_col(lane_idx(), 0));
#pragma unroll
    for (int d = 0; d < NUM_OUT_FRAGS * 2; ++d) {  // 8 columns each
      const auto& x = out[d / 2].x;
      const int i = d % 2 * 4 + r * 2;
      gmem_store_packet(to + d * 8, pair_of(x[i], x[i + 1]));
    }
  }
}

// A row's softmax over the keys of one split.
struct PartialStats {
  float row_max, row_sum;
};

FC_DEVICE PartialStats load_stats(const AttnParams& p, int64_t at) {
  const GmemPtr<const float> stats = {p.splits.split_stats.address};
  const auto packet = gmem_load_packet<8>(stats + at * 2);
  return {from_packet<float>(Packet<4>{{packet.word[0]}}),
          from_packet<float>(Packet<4>{{packet.word[1]}})};
}

// By what a row's sums are multiplied in the result, once all shares are in them.
FC_DEVICE float result_factor(const AttnParams& p, const BlockCoord& block, int row,
                              float& row_max, float& sum) {
  float weight = 1.0f;
  if constexpr (HAS_SINKS) {  // here, so that it counts once
    weight = join_sink(row_max, sum, sink_of(p, block.head_idx, row), p);
  }
  const bool empty = sum == 0.0f;  // finish_softmax has the same rule
  float inverse = empty ? 0.0f : weight * rcp_approx(sum);
  if (FLOAT8) inverse *= p.scales.v_factor;
  return inverse;
}

FC_DEVICE void store_lse(const AttnParams& p, const BlockCoord& block, int row, float row_max,
                         float sum) {
  const float lse = natural_lse(row_max, sum, p);
  gmem_store(p.tensors.lse + lse_offset(p, block, row), sum == 0.0f ? NEG_INF : lse);
}

// Adds up the splits of PARTS parts of a group's rows, divides, and stores O and lse; of partial
// results PACKETS are under way at once in a thread. A part is two packets of a row, half a row
// apart, so that most threads work though rows are few. Past the last split it is loaded again. The
// sums so far are brought to a new maximum, which is the step of the online softmax.
template <int NUM_OUT_FRAGS, int PARTS, int PACKETS>
FC_DEVICE void add_up_parts(const AttnParams& p, const BlockCoord& block, int group_row,
                            int first_part, int num_parts, float scale_log2) {
  static_assert(HEAD_DIM_V % 8 == 0, "as TMA wants of rows");
  constexpr int HALF = HEAD_DIM_V / 2;
  constexpr int PARTS_OF_ROW = HALF / 4;
  // Whatever the rows are, as many shares have one maximum if a sequence alone is to decide.
  constexpr int AT_ONCE = FIXED_PIECES ? 4 : PACKETS / 2 / PARTS;
  const GmemPtr<const float> partials = {p.splits.split_out.address};
  const int num_splits = num_splits_of(p, block);
  int row[PARTS], col[PARTS];
  float row_max[PARTS], sum[PARTS];
  float out[PARTS][2][4] = {};
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const int part = min_i(first_part + i * 128, num_parts - 1);
    row[i] = group_row + part / PARTS_OF_ROW;
    col[i] = part % PARTS_OF_ROW * 4;
    row_max[i] = NEG_INF;
    sum[i] = 0.0f;
  }
  for (int begin = 0; begin < num_splits; begin += AT_ONCE) {
    PartialStats stats[AT_ONCE][PARTS];
    Packet<16> partial[AT_ONCE][PARTS][2];
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s) {
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        const int64_t at = partial_row(p, block, min_i(begin + s, num_splits - 1), row[i]);
        const auto from = partials + (at * (NUM_OUT_FRAGS * 16) + col[i]);
        stats[s][i] = load_stats(p, at);
        partial[s][i][0] = gmem_load_packet<16>(from);
        partial[s][i][1] = gmem_load_packet<16>(from + HALF);
      }
    }
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      const float old_max = row_max[i];
#pragma unroll
      for (int s = 0; s < AT_ONCE; ++s) row_max[i] = max_f(row_max[i], stats[s][i].row_max);
      const float finite_max = row_max[i] == NEG_INF ? 0.0f : row_max[i];
      const float factor = exp2_approx((old_max - finite_max) * scale_log2);
      sum[i] *= factor;
#pragma unroll
      for (int c = 0; c < 8; ++c) out[i][c / 4][c % 4] *= factor;
#pragma unroll
      for (int s = 0; s < AT_ONCE; ++s) {
        if (begin + s >= num_splits) continue;
        const float weight = exp2_approx((stats[s][i].row_max - finite_max) * scale_log2);
        sum[i] += weight * stats[s][i].row_sum;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const Packet<4> x = {{partial[s][i][c / 4].word[c % 4]}};
          out[i][c / 4][c % 4] += weight * from_packet<float>(x);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    if (first_part + i * 128 >= num_parts) continue;
    const float inverse = result_factor(p, block, row[i], row_max[i], sum[i]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto& x = out[i][half];
      const Packet<8> packed = {{pack2<Element>(x[0] * inverse, x[1] * inverse),
                                 pack2<Element>(x[2] * inverse, x[3] * inverse)}};
      const int64_t at = out_offset(p, block, row[i]) + half * HALF + col[i];
      gmem_store_packet(p.tensors.out + at, packed);
    }
    if (!is_null(p.tensors.lse) && col[i] == 0) {
      store_lse(p, block, row[i], row_max[i], sum[i]);
    }
  }
}

// Of all rows of a group: two parts a thread at once where there are so many and registers for
// them, or one after the other would wait.
template <int NUM_OUT_FRAGS, int PACKETS>
FC_DEVICE void add_up_partials(const AttnParams& p, const BlockCoord& block, int group_row,
                               float scale_log2) {
  constexpr int MOST_PARTS = PACKETS < 16 ? 1 : 2;
  const int most_rows = FOLDS_PACKED ? rows_of_box(p) : 64;  // the others are nobody's
  const int num_parts = min_i(most_rows, p.seqlen_q - group_row) * (HEAD_DIM_V / 8);
  int part = thread_idx() % 128;
  if (MOST_PARTS > 1 && num_parts <= 128) {
    if (part < num_parts) {
      add_up_parts<NUM_OUT_FRAGS, 1, PACKETS>(p, block, group_row, part, num_parts, scale_log2);
    }
    return;
  }
  for (; part < num_parts; part += MOST_PARTS * 128) {
    add_up_parts<NUM_OUT_FRAGS, MOST_PARTS, PACKETS>(p, block, group_row, part, num_parts,
                                                     scale_log2);
  }
}

// Adds up, by a warp, all shares of 16 columns of a row, with one latency for up to 128: four lanes
// read what is 64 bytes of a share, each eighth share, and lanes' sums are then brought to one
// maximum.
template <int NUM_OUT_FRAGS>
FC_DEVICE void add_up_by_warp(const AttnParams& p, const BlockCoord& block, int row, int col,
                              float scale_log2) {
  constexpr int LANES_OF_SHARE = 4, SHARES_OF_WARP = 32 / LANES_OF_SHARE, AT_ONCE = 16;
  const GmemPtr<const float> partials = {p.splits.split_out.address};
  const int num_splits = p.splits.num_splits;
  const int last = num_splits - 1;
  const int own = lane_idx() / LANES_OF_SHARE;
  col += lane_idx() % LANES_OF_SHARE * 4;
  float row_max = NEG_INF, sum = 0.0f;
  float out[4] = {};
  for (int begin = 0; begin < num_splits; begin += SHARES_OF_WARP * AT_ONCE) {
    PartialStats stats[AT_ONCE];
    Packet<16> partial[AT_ONCE];
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s) {
      const int64_t at = partial_row(p, block, min_i(begin + s * SHARES_OF_WARP + own, last), row);
      stats[s] = load_stats(p, at);
      partial[s] = gmem_load_packet<16>(partials + (at * (NUM_OUT_FRAGS * 16) + col));
    }
    const float old_max = row_max;
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s) row_max = max_f(row_max, stats[s].row_max);
    const float finite_max = row_max == NEG_INF ? 0.0f : row_max;
    const float factor = exp2_approx((old_max - finite_max) * scale_log2);
    sum *= factor;
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] *= factor;
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s) {
      if (begin + s * SHARES_OF_WARP + own > last) continue;
      const float weight = exp2_approx((stats[s].row_max - finite_max) * scale_log2);
      sum += weight * stats[s].row_sum;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        out[c] += weight * from_packet<float>(Packet<4>{{partial[s].word[c]}});
      }
    }
  }
  const float own_max = row_max;
#pragma unroll
  for (int bit = LANES_OF_SHARE; bit < 32; bit *= 2) {
    row_max = max_f(row_max, shfl_xor(row_max, bit));
  }
  const float finite_max = row_max == NEG_INF ? 0.0f : row_max;
  const float factor = exp2_approx((own_max - finite_max) * scale_log2);
  sum *= factor;
#pragma unroll
  for (int c = 0; c < 4; ++c) out[c] *= factor;
#pragma unroll
  for (int bit = LANES_OF_SHARE; bit < 32; bit *= 2) {
    sum += shfl_xor(sum, bit);
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] += shfl_xor(out[c], bit);
  }
  if (own != 0 || col >= HEAD_DIM_V) return;  // the last 16 columns may be padding from the 8th on
  const float inverse = result_factor(p, block, row, row_max, sum);
  const Packet<8> packed = {{pack2<Element>(out[0] * inverse, out[1] * inverse),
                             pack2<Element>(out[2] * inverse, out[3] * inverse)}};
  gmem_store_packet(p.tensors.out + (out_offset(p, block, row) + col), packed);
  if (!is_null(p.tensors.lse) && col == 0) store_lse(p, block, row, row_max, sum);
}

// Writes a warp's 16 rows of out and lse where no other block has a part of their keys.
template <int NUM_OUT_FRAGS>
FC_DEVICE void store_whole(const AttnParams& p, const BlockCoord& block, int warp_row,
                           const OnlineSoftmax& softmax, const WmmaAccum (&out)[NUM_OUT_FRAGS]) {
  float inverse_sum[2];
  finish_softmax(softmax, p, lse_offset(p, block, warp_row), p.seqlen_q - warp_row, block.head_idx,
                 inverse_sum);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row + accum_row(lane_idx(), r * 2);
    if (!is_row(p, row)) break;
    const auto to = p.tensors.out + (out_offset(p, block, row) + accum_col(lane_idx(), 0));
#pragma unroll
    for (int d = 0; d < HEAD_DIM_V / 8; ++d) {
      const auto& x = out[d / 2].x;
      const int i = d % 2 * 4 + r * 2;
      gmem_store_packet(to + d * 8, to_packet(pack2<Element>(x[i] * inverse_sum[r],
                                                             x[i + 1] * inverse_sum[r])));
    }
  }
}

// Returns whether the groups that share a row tile's keys add up its shares together.
FC_DEVICE bool adds_up_together(const AttnParams& p) {
  return MAY_ADD_UP_TOGETHER && p.splits.most_polls > 0;
}

// The counter of a group's rows; of those that add up together the first of two.
FC_DEVICE GmemPtr<int32_t> share_counter(const AttnParams& p, const BlockCoord& block,
                                         int row_group) {
  const int head = block.batch_idx * p.num_heads_q + block.head_idx;
  const int row_tile = head * p.num_m_blocks + block.m_begin / BLOCK_M;
  const int number = STREAM_K && !FIXED_PIECES ? first_block_of(block) : row_tile;
  const int place = number * GROUPS_OF_TILE + row_group;
  return p.tile_counter + (adds_up_together(p) ? 2 * place : place);
}

// A counter's lower half counts the shares that are there, its upper half groups that have left.
constexpr int ONE_LEFT = 1 << 16;

// By one thread: counts a share and waits for the others. Returns what the counter says once all
// are there, or 0 where the group has left.
FC_DEVICE int await_shares(const AttnParams& p, const BlockCoord& block,
                           GmemPtr<int32_t> counter) {
  const int most_polls = block.is_last ? p.splits.most_polls : 0;
  int seen = gmem_atomic_add_acq_rel(counter, 1) + 1;
  for (int polls = 0; seen % ONE_LEFT < p.splits.num_splits; ++polls) {
    const bool leaves =
        polls >= most_polls && gmem_atomic_cas(counter, seen, seen + ONE_LEFT) == seen;
    if (leaves) return 0;
    seen = gmem_load_acquire(counter);
  }
  return seen;
}

// Adds up the shares of a group's rows together with the other groups that have some.
template <int NUM_OUT_FRAGS, class Sync>
FC_DEVICE void add_up_together(const AttnParams& p, const BlockCoord& block, int group_row,
                               GmemPtr<int32_t> counter, float scale_log2, const Sync& sync,
                               SmemPtr<int32_t> arrival) {
  const int num_splits = p.splits.num_splits;
  const bool counts = thread_idx() % 128 == 0;
  int seen = 0;
  int departure = 0;  // how many were done waiting before this group
  if (counts) {
    seen = await_shares(p, block, counter);
    int number = block.split;
    if (seen >= ONE_LEFT) number = departure = gmem_atomic_add(counter + 1, 1);
    const int num_groups = num_splits - seen / ONE_LEFT;
    smem_store(arrival, seen == 0 ? 0 : num_groups * ONE_LEFT + number);
  }
  sync();  // tells that to all, and hands on what the count made known
  const int told = smem_load(arrival);
  if (told == 0) return;
  const int num_groups = told / ONE_LEFT;
  const int number = told % ONE_LEFT;
  if (counts && num_groups == num_splits) departure = gmem_atomic_add(counter + 1, 1);
  const int num_parts = min_i(64, p.seqlen_q - group_row) * NUM_OUT_FRAGS;
  const int of_group = (num_parts + num_groups - 1) / num_groups;
  const int end = min_i(num_parts, (number + 1) * of_group);
  for (int part = number * of_group + warp_idx() % 4; part < end; part += 4) {
    add_up_by_warp<NUM_OUT_FRAGS>(p, block, group_row + part / NUM_OUT_FRAGS,
                                  part % NUM_OUT_FRAGS * 16, scale_log2);
  }
  if (counts && departure == num_groups - 1) {  // for the next launch: nobody looks any more
    gmem_atomic_add(counter, -seen);
    gmem_atomic_add(counter + 1, -num_groups);
  }
}

// Counts a group's share, which its threads have written, and adds up all of them if it was the
// last one. `sync` is a barrier of the group's threads; `arrival` its int in shared memory.
template <int PACKETS, int NUM_OUT_FRAGS, class Sync>
FC_DEVICE void count_partial(const AttnParams& p, const BlockCoord& block, int row_group,
                             float scale_log2, const Sync& sync, SmemPtr<int32_t> arrival) {
  const int group_row = block.m_begin + row_group * 64;
  sync();  // orders all warps' writes before the count
  const auto counter = share_counter(p, block, row_group);
  if (adds_up_together(p)) {
    add_up_together<NUM_OUT_FRAGS>(p, block, group_row, counter, scale_log2, sync, arrival);
    return;
  }
  if (thread_idx() % 128 == 0) {
    const int num_splits = num_splits_of(p, block);
    const bool last = gmem_atomic_add_acq_rel(counter, 1) == num_splits - 1;
    if (last) gmem_atomic_add(counter, -num_splits);  // for the next launch
    smem_store(arrival, last ? 1 : 0);
  }
  sync();  // hands on what the count made known
  if (smem_load(arrival) == 0) return;
  add_up_partials<NUM_OUT_FRAGS, PACKETS>(p, block, group_row, scale_log2);
}

// Hands over a group's partial result, or writes out where it is all of it.
template <int PACKETS, int NUM_OUT_FRAGS, class Sync>
FC_DEVICE void hand_over_partial(const AttnParams& p, const BlockCoord& block, int row_group,
                                 const OnlineSoftmax& softmax,
                                 const WmmaAccum (&out)[NUM_OUT_FRAGS], float scale_log2,
                                 const Sync& sync, SmemPtr<int32_t> arrival) {
  const int warp_row = block.m_begin + row_group * 64 + warp_idx() % 4 * 16;
  if (STREAM_K && num_splits_of(p, block) == 1) {
    store_whole(p, block, warp_row, softmax, out);
    return;
  }
  store_partial(p, block, warp_row, softmax, out);
  count_partial<PACKETS, NUM_OUT_FRAGS>(p, block, row_group, scale_log2, sync, arrival);
}
