// fwd_sm90/float8/few_rows_sm90.cuh - 8-bit caches where a row tile has one or two strips of 16
// rows, as in decoding: the four consumer warps share the keys of each key tile, or two warps do
// for each strip, and what they have in the end is added up. No warp waits for another in between.
//
// A warp reads bytes of K and V as 8x8 matrices of pairs, turns them into float16 in registers, and
// multiplies 16 x 16 x 16 by itself (wmma_mma). So a byte passes shared memory twice, once in and
// once out. Through tiles of 16 bits, as WGMMA reads them (fwd_sm90/float8/float8_sm90.cuh), it
// would six times, and WGMMA and softmax would compute 64 rows.
//
// Nothing has to be exchanged, as columns may have any order that both factors agree on:
//
// - K: lane 4 r + c gets columns 4 c to 4 c + 3 of 16 of key r in one register, a product's two
//   pairs. Q's fragments are loaded in that order (query_pair).
// - V: transposed, it gets columns 2 r and 2 r + 1 of keys 2 c and 2 c + 1; two bytes change
//   places. Column n of a fragment of O is column 2 n of V, or 2 (n - 8) + 1, so that a lane has
//   columns 4 c to 4 c + 3.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/mask.cuh"
#include "tile/max_score.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/shares.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/float8/float8_sm90.cuh"
#include "fwd_sm90/layout_sm90.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "fwd_sm90/split_sm90.cuh"

constexpr int KEY_WARPS = FEW_ROWS ? 4 / STRIPS : 4;  // that share the keys of 16 rows
constexpr int WARP_KEYS = BLOCK_N / KEY_WARPS;            // of a key tile
constexpr int WARP_FRAGS = FEW_ROWS ? WARP_KEYS / 16 : 1;
static_assert(!FEW_ROWS || WARP_KEYS % 16 == 0, "fragments of 16 keys");

// A warp's number among those of the rows, and among those that share their keys.
FC_DEVICE int strip_idx() { return warp_idx() % (4 / KEY_WARPS); }
FC_DEVICE int key_warp() { return warp_idx() % 4 / (4 / KEY_WARPS); }

// A warp's part of a row tile.
struct FewRows {
  WmmaAccum out[OUT_FRAGS];
  OnlineSoftmax softmax;
  Queries queries;
  PipelineState state;
  float scale_log2;
  bool has_max;    // of a key tile; all lanes agree
  bool has_upper;  // whether rows 8 to 15 exist
};

// The exponentials of rows 0 to 7 alone: a lane's other row is nobody's.
FC_DEVICE void exponentiate_lower(WmmaAccum (&scores)[WARP_FRAGS], float (&sum)[2],
                                  const float (&max_log2)[2], float scale_log2) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int n = 0; n < WARP_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float prob = 0.0f;
      if (row_of_element(i) == 0) {
        prob = exp2_approx(fma_rn(scores[n].x[i], scale_log2, -max_log2[0]));
        sum[0] += prob;
      }
      scores[n].x[i] = prob;
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

// 16 columns of 16 keys as B of Q K^T, from the registers of eight keys each.
FC_DEVICE WmmaBCol<MathElement> key_operand(uint32_t first, uint32_t second) {
  uint32_t of_first[2], of_second[2];
  widen4<MathElement>(first, of_first);
  widen4<MathElement>(second, of_second);
  WmmaBCol<MathElement> b;
  b.reg[0] = of_first[0];
  b.reg[1] = of_first[1];
  b.reg[2] = of_second[0];
  b.reg[3] = of_second[1];
  return b;
}

// 16 columns of 16 values as B of P V, from the registers of eight values each.
FC_DEVICE WmmaBRow<MathElement> value_operand(uint32_t first, uint32_t second) {
  constexpr uint32_t COLUMNS_APART = 0x3120;
  uint32_t of_first[2], of_second[2];
  widen4<MathElement>(permute_bytes<COLUMNS_APART>(first, 0), of_first);
  widen4<MathElement>(permute_bytes<COLUMNS_APART>(second, 0), of_second);
  WmmaBRow<MathElement> b;
  b.reg[0] = of_first[0];
  b.reg[1] = of_second[0];
  b.reg[2] = of_first[1];
  b.reg[3] = of_second[1];
  return b;
}

template <class Tile>
FC_DEVICE void multiply_keys(WmmaAccum (&scores)[WARP_FRAGS], const Queries& queries, Tile k,
                             int first_row) {
#pragma unroll
  for (int n = 0; n < WARP_FRAGS; ++n) {
    wmma_fill(scores[n], 0.0f);
#pragma unroll
    for (int d = 0; d < Q_FRAGS; d += 2) {
      uint32_t bytes[4];
      ldmatrix_x4(matrix_row(k, first_row + n * 16, d * 16), bytes);
      wmma_mma(scores[n], queries.frag[d], key_operand(bytes[0], bytes[1]));
      wmma_mma(scores[n], queries.frag[d + 1], key_operand(bytes[2], bytes[3]));
    }
  }
}

template <class Tile>
FC_DEVICE void multiply_values(WmmaAccum (&out)[OUT_FRAGS],
                               const WmmaA<MathElement> (&probs)[WARP_FRAGS], Tile v,
                               int first_row) {
#pragma unroll
  for (int n = 0; n < WARP_FRAGS; ++n) {
#pragma unroll
    for (int d = 0; d < OUT_FRAGS; d += 2) {
      uint32_t bytes[4];
      ldmatrix_x4_trans(matrix_row(v, first_row + n * 16, d * 16), bytes);
      wmma_mma(out[d], probs[n], value_operand(bytes[0], bytes[1]));
      wmma_mma(out[d + 1], probs[n], value_operand(bytes[2], bytes[3]));
    }
  }
}

// The softmax of a warp's keys: tries old maxima first, see has_outgrown. Where they do not serve,
// `make` gives the scores again. Returns whether row_max moved, as softmax_step does.
template <class Make>
FC_DEVICE bool softmax_of_warp(WmmaAccum (&scores)[WARP_FRAGS], FewRows& c, float (&rescale)[2],
                               const Make& make) {
  make(scores);
  if (LAZY_RESCALE && c.has_max) {
    const float max_log2[2] = {c.softmax.row_max[0] * c.scale_log2,
                               c.has_upper ? c.softmax.row_max[1] * c.scale_log2 : 0.0f};
    float tile_sum[2];
    if (c.has_upper) {
      exponentiate<0, WARP_FRAGS>(scores, tile_sum, max_log2, c.scale_log2);
    } else {
      exponentiate_lower(scores, tile_sum, max_log2, c.scale_log2);
    }
    if (!warp_any(has_outgrown(tile_sum, max_log2))) {
      c.softmax.row_sum[0] += tile_sum[0];
      c.softmax.row_sum[1] += tile_sum[1];
      return false;
    }
    make(scores);
  }
  c.has_max = true;
  constexpr bool IS_LAZY = LAZY_RESCALE && WARP_FRAGS > 1;  // takes a tile in two parts
  return softmax_step<IS_LAZY>(scores, c.softmax, rescale, c.scale_log2);
}

// A warp's keys of one key tile.
template <class Smem>
FC_DEVICE void few_rows_of_tile(FewRows& c, const AttnParams& p, const Barriers& bar,
                                const Smem& smem, int row_begin, int n_block) {
  const int first_row = key_warp() * WARP_KEYS;
  const int key_begin = n_block * BLOCK_N + first_row;
  const int stage = c.state.stage();
  const int parity = c.state.parity();
  const bool has_keys = key_begin < p.seqlen_k;  // or there is nothing to be seen
  WmmaA<MathElement> probs[WARP_FRAGS];
  mbar_wait(bar.k_full + stage, parity);
  if (has_keys) {
    WmmaAccum scores[WARP_FRAGS];
    float rescale[2];
    const auto make = [&](WmmaAccum(&made)[WARP_FRAGS]) {
      multiply_keys(made, c.queries, smem.k[stage], first_row);
      scale_products(made, c.queries);
      scale_scores(made, p);
      hide_scores(made, p, row_begin + strip_idx() * 16, key_begin);
    };
    if (softmax_of_warp(scores, c, rescale, make)) rescale_output(c.out, rescale);
#pragma unroll
    for (int n = 0; n < WARP_FRAGS; ++n) wmma_accum_to_a(probs[n], scores[n]);
  }
  warp_sync();  // orders all lanes' reads before the first one's arrival
  release(bar.k_empty, c.state);
  mbar_wait(bar.v_full + stage, parity);
  if (has_keys) multiply_values(c.out, probs, smem.v[stage], first_row);
  warp_sync();  // as for K
  release(bar.v_empty, c.state);
  ++c.state.count;
}

// Adds up what the warps of a strip have, in their order. The first warp goes on with the sum, as
// accumulators have it; the others have nothing left.
FC_DEVICE void add_up_warps(FewRows& c, SmemPtr<float> merge_smem, int barrier) {
  const int warp = warp_idx() % 4;
  const int lane = lane_idx();
  const auto stats_of = [&](int w, int r) {
    return merge_smem + (w * WARP_FLOATS + 16 * ROW_FLOATS + (lane / 4 + r * 8) * 2);
  };
  named_barrier_sync(barrier, 128);  // orders reads of the row tile before ahead of these writes
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r > 0 && !c.has_upper) break;
    const float sum = quad_sum(c.softmax.row_sum[r]);
    if (lane % 4 == 0) smem_store_packet(stats_of(warp, r), pair_of(c.softmax.row_max[r], sum));
    const auto row = merge_smem + (warp * WARP_FLOATS + (lane / 4 + r * 8) * ROW_FLOATS);
#pragma unroll
    for (int d = 0; d < OUT_FRAGS; ++d) {
      const auto& x = c.out[d].x;
      Packet<16> packet;
#pragma unroll
      for (int i = 0; i < 4; ++i) packet.word[i] = to_packet(x[r * 2 + i / 2 + i % 2 * 4]).word[0];
      smem_store_packet(row + (d * 16 + lane % 4 * 4), packet);
    }
  }
  named_barrier_sync(barrier, 128);  // hands the writes above on to the first warp
  if (key_warp() > 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r > 0 && !c.has_upper) break;
    float weight[KEY_WARPS];
    float max[KEY_WARPS], sum[KEY_WARPS];
    c.softmax.row_max[r] = NEG_INF;
#pragma unroll
    for (int w = 0; w < KEY_WARPS; ++w) {
      const auto packet = smem_load_packet<8>(stats_of(warp + w * (4 / KEY_WARPS), r));
      max[w] = from_packet<float>(Packet<4>{{packet.word[0]}});
      sum[w] = from_packet<float>(Packet<4>{{packet.word[1]}});
      c.softmax.row_max[r] = max_f(c.softmax.row_max[r], max[w]);
    }
    const float finite_max = c.softmax.row_max[r] == NEG_INF ? 0.0f : c.softmax.row_max[r];
    c.softmax.row_sum[r] = 0.0f;
#pragma unroll
    for (int w = 0; w < KEY_WARPS; ++w) {
      weight[w] = exp2_approx((max[w] - finite_max) * c.scale_log2);
      c.softmax.row_sum[r] += weight[w] * sum[w];
    }
    if (lane % 4 != 0) c.softmax.row_sum[r] = 0.0f;  // lanes have shares of it
    const auto row = merge_smem + (warp * WARP_FLOATS + (lane / 4 + r * 8) * ROW_FLOATS);
#pragma unroll
    for (int d = 0; d < 2 * OUT_FRAGS; ++d) {  // 8 columns each
      const auto place = row + (d * 8 + accum_col(lane, 0));
      float out[2] = {0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < KEY_WARPS; ++w) {
        const auto packet = smem_load_packet<8>(place + w * (4 / KEY_WARPS) * WARP_FLOATS);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          out[j] += weight[w] * from_packet<float>(Packet<4>{{packet.word[j]}});
        }
      }
      c.out[d / 2].x[d % 2 * 4 + r * 2] = out[0];
      c.out[d / 2].x[d % 2 * 4 + r * 2 + 1] = out[1];
    }
  }
}

// The consumer warpgroup: up to 16 STRIPS query rows of every row tile of this block. A template,
// like what it calls, as other kernels have no such tiles.
template <class Smem>
FC_DEVICE void consume_few_rows(const AttnParams& p, const Barriers& bar, const Smem& smem) {
  FewRows c;
  for (int turn = 0;; ++turn) {
    const int slot = q_slot(turn, 0);
    mbar_wait(bar.q_full + slot, q_parity(turn));
    const auto coord = coord_slot(smem.coords, turn);
    if (smem_load(coord) == NO_TILE) return;
    const BlockCoord block = load_coord(coord);
    const auto& own = sequence_params(p, block);
    load_queries(c.queries, smem.q[slot], STORE_BARRIER);
    if (lane_idx() == 0) mbar_arrive(bar.q_empty + slot);
    const float of_products = scales_products(c.queries) ? 1.0f : c.queries.inverse[0];
    c.scale_log2 = softmax_scale_log2(own) * of_products;
    c.softmax = {{NEG_INF, NEG_INF}, {0.0f, 0.0f}};
    c.has_max = false;
    const int first_row = block.m_begin + strip_idx() * 16;
    c.has_upper = first_row + 8 < own.seqlen_q;
#pragma unroll
    for (int d = 0; d < OUT_FRAGS; ++d) wmma_fill(c.out[d], 0.0f);

    const Range keys = own_keys(own, block);
    for (int n_block = keys.end - 1; n_block >= keys.begin; --n_block) {
      few_rows_of_tile(c, own, bar, smem, block.m_begin, n_block);
    }
    c.softmax.row_max[0] *= of_products;  // what follows knows nothing of factors
    c.softmax.row_max[1] *= of_products;
    c.scale_log2 = softmax_scale_log2(own);
    if (RETURNS_MAX_SCORE) raise_max_score(c.softmax, own, block, first_row);
    add_up_warps(c, smem.merge, STORE_BARRIER);
    if constexpr (SPLIT_KV) {
      const auto sync = [&] { named_barrier_sync(STORE_BARRIER, 128); };
      hand_over_partial<PARTIAL_PACKETS>(own, block, 0, c.softmax, c.out, c.scale_log2, sync,
                                         smem.arrival);
    } else {
      store_whole(own, block, block.m_begin + warp_idx() % 4 * 16, c.softmax, c.out);
    }
  }
}
