// fwd_sm90/float8/few_rows_sm90.cuh - 8-bit caches where a row tile has one to four strips of 8
// rows, as in decoding: the four consumer warps share the keys of each key tile, or some of them do
// for each strip, and what they have in the end is added up. No warp waits for another in between.
//
// A warp reads bytes of K and V as 8x8 matrices of pairs, turns them into float16 in registers, and
// multiplies by itself, with queries as the product's 8 columns:
//
//     S^T = K Q^T      O^T = V^T P^T
//
// So a byte passes shared memory twice, once in and once out, and products and exponentials are of
// 8 rows. Through tiles of 16 bits, as WGMMA reads them (fwd_sm90/float8/float8_sm90.cuh), a byte
// would pass six times, and WGMMA and softmax would compute 64 rows.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/folded_rows.cuh"
#include "tile/mask.cuh"
#include "tile/max_score.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/shares.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/float8/float8_sm90.cuh"
#include "fwd_sm90/float8/strips_sm90.cuh"
#include "fwd_sm90/layout_sm90.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "fwd_sm90/split_sm90.cuh"

// Sets what the window and the sequence's end hide to -inf, for 8 rows from `row_begin` on.
FC_DEVICE void hide_strip(StripScores& scores, const AttnParams& p, int row_begin, int key_begin) {
  const BandOf<> band = {p};
  const int first_key = key_begin + lane_idx() / 4;
  int begin[2], end[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = query_of(p, row_begin + lane_idx() % 4 * 2 + r);
    begin[r] = (HAS_WINDOW_LEFT ? band.first_column(query) : 0) - first_key;
    end[r] = p.seqlen_k - first_key;
    if (HAS_WINDOW_RIGHT) end[r] = min_i(end[r], band.last_column(query) + 1 - first_key);
  }
#pragma unroll
  for (int n = 0; n < KEY_PAIRS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = n * 32 + i / 4 * 16 + i % 2 * 8;
      const int r = row_of_element(i);
      if ((HAS_WINDOW_LEFT && key < begin[r]) || key >= end[r]) scores[n].x[i] = NEG_INF;
    }
  }
}

// The step of the online softmax (raise_max in tile/softmax.cuh), by the maxima of all lanes.
FC_DEVICE void softmax_of_strip(StripScores& scores, Strip& s) {
  float max[2], rescale[2], max_log2[2], sum[2];
  lane_max<0, KEY_PAIRS>(scores, max);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float new_max = max_f(s.softmax.row_max[r], max_of_lanes(max[r]));
    const float finite_max = new_max == NEG_INF ? 0.0f : new_max;
    rescale[r] = exp2_approx((s.softmax.row_max[r] - finite_max) * s.scale_log2);
    s.softmax.row_max[r] = new_max;
  }
  scale_max(s.softmax, s.scale_log2, max_log2);
  subtract_large_max<0, KEY_PAIRS, false>(scores, s.softmax, max_log2);
  exponentiate<0, KEY_PAIRS>(scores, sum, max_log2, s.scale_log2);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    s.softmax.row_sum[r] = fma_rn(s.softmax.row_sum[r], rescale[r], sum[r]);
  }
  rescale_output(s.out, rescale);
}

// The softmax of a warp's keys: tries old maxima first, see has_outgrown. Where they do not serve,
// `make` gives the scores again.
template <class Make>
FC_DEVICE void softmax_of_warp(StripScores (&scores)[WARP_STRIPS], FewRows& c, const Make& make) {
  make(scores);
  if (LAZY_RESCALE && c.has_max) {
    float sums[WARP_STRIPS][2];
    bool outgrown = false;
#pragma unroll
    for (int s = 0; s < WARP_STRIPS; ++s) {
      const Strip& strip = c.strip[s];
      const float max_log2[2] = {strip.softmax.row_max[0] * strip.scale_log2,
                                 strip.softmax.row_max[1] * strip.scale_log2};
      exponentiate<0, KEY_PAIRS>(scores[s], sums[s], max_log2, strip.scale_log2);
      outgrown |= has_outgrown(sums[s], max_log2);
    }
    if (!warp_any(outgrown)) {
#pragma unroll
      for (int s = 0; s < WARP_STRIPS; ++s) {
        c.strip[s].softmax.row_sum[0] += sums[s][0];
        c.strip[s].softmax.row_sum[1] += sums[s][1];
      }
      return;
    }
    make(scores);
  }
  c.has_max = true;
#pragma unroll
  for (int s = 0; s < WARP_STRIPS; ++s) softmax_of_strip(scores[s], c.strip[s]);
}

// A warp's keys of one key tile.
template <class Smem>
FC_DEVICE void few_rows_of_tile(FewRows& c, const AttnParams& p, const Barriers& bar,
                                const Smem& smem, int warp_row, int n_block) {
  const int first_row = key_warp() * WARP_KEYS;
  const int key_begin = n_block * BLOCK_N + first_row;
  const int stage = c.state.stage();
  const int parity = c.state.parity();
  const bool has_keys = key_begin < p.seqlen_k;  // or there is nothing to be seen
  MmaB8<MathElement> probs[WARP_STRIPS][2 * KEY_PAIRS];
  mbar_wait(bar.k_full + stage, parity);
  if (has_keys) {
    StripScores scores[WARP_STRIPS];
    const bool hides = key_begin + WARP_KEYS > p.seqlen_k ||
                       window_hides_some<WARP_ROWS, WARP_KEYS>(p, warp_row, key_begin);
    const auto make = [&](StripScores(&made)[WARP_STRIPS]) {
      multiply_keys(made, c, smem.k[stage], first_row);
#pragma unroll
      for (int s = 0; s < WARP_STRIPS; ++s) {
        if (SCORES_ARE_SCALED || c.strip[s].differ) scale_rows(made[s], c.strip[s].inverse);
        scale_scores(made[s], p);
        if (hides) hide_strip(made[s], p, warp_row + s * STRIP_ROWS, key_begin);
      }
    };
    softmax_of_warp(scores, c, make);
#pragma unroll
    for (int s = 0; s < WARP_STRIPS; ++s) probs_of_scores(probs[s], scores[s]);
  }
  warp_sync();  // orders all lanes' reads before the first one's arrival
  release(bar.k_empty, c.state);
  mbar_wait(bar.v_full + stage, parity);
  if (has_keys) multiply_values(c, probs, smem.v[stage], first_row);
  warp_sync();  // as for K
  release(bar.v_empty, c.state);
  ++c.state.count;
}

// Where in shared memory a warp's results for one of its rows are, and the row's maximum and sum.
FC_DEVICE SmemPtr<float> row_of_warp(SmemPtr<float> merge_smem, int warp, int row) {
  return merge_smem + (warp * WARP_FLOATS + row * ROW_FLOATS);
}
FC_DEVICE SmemPtr<float> stats_of_warp(SmemPtr<float> merge_smem, int warp, int row) {
  return merge_smem + (warp * WARP_FLOATS + WARP_ROWS * ROW_FLOATS + row * 2);
}

// Writes what a warp has of `num_rows` rows, those of the row tile that exist.
FC_DEVICE void store_warp(const FewRows& c, SmemPtr<float> merge_smem, int num_rows) {
  const int warp = warp_idx() % 4;
  const int lane = opaque(lane_idx());  // as in load_strip
#pragma unroll
  for (int s = 0; s < WARP_STRIPS; ++s) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = s * STRIP_ROWS + lane % 4 * 2 + r;
      const float sum = sum_of_lanes(c.strip[s].softmax.row_sum[r]);
      if (rows_idx() * WARP_ROWS + row >= num_rows) continue;
      if (lane < 4) {
        smem_store_packet(stats_of_warp(merge_smem, warp, row),
                          pair_of(c.strip[s].softmax.row_max[r], sum));
      }
      const auto to = row_of_warp(merge_smem, warp, row) + lane / 4 * 2;
#pragma unroll
      for (int d = 0; d < OUT_FRAGS; ++d) {
        const auto& x = c.strip[s].out[d / 2].x;
        const int i = d % 2 * 4 + r * 2;
        smem_store_packet(to + d * 16, pair_of(x[i], x[i + 1]));
      }
    }
  }
}

// Adds up what warps have of four columns of a row, from `col` on. Says their maximum and sum.
FC_DEVICE void add_up_columns(SmemPtr<float> merge_smem, int row, int col, float scale_log2,
                              float (&out)[4], float& row_max, float& row_sum) {
  const int first_warp = row / WARP_ROWS;
  float max[KEY_WARPS], sum[KEY_WARPS];
  row_max = NEG_INF;
#pragma unroll
  for (int w = 0; w < KEY_WARPS; ++w) {
    const auto packet = smem_load_packet<8>(
        stats_of_warp(merge_smem, first_warp + w * WARPS_OF_ROWS, row % WARP_ROWS));
    max[w] = from_packet<float>(Packet<4>{{packet.word[0]}});
    sum[w] = from_packet<float>(Packet<4>{{packet.word[1]}});
    row_max = max_f(row_max, max[w]);
  }
  const float finite_max = row_max == NEG_INF ? 0.0f : row_max;
  row_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = 0.0f;
#pragma unroll
  for (int w = 0; w < KEY_WARPS; ++w) {
    const float weight = exp2_approx((max[w] - finite_max) * scale_log2);
    row_sum += weight * sum[w];
    const auto packet = smem_load_packet<16>(
        row_of_warp(merge_smem, first_warp + w * WARPS_OF_ROWS, row % WARP_ROWS) + col);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] += weight * from_packet<float>(Packet<4>{{packet.word[i]}});
    }
  }
}

// Adds up what warps have of a row tile's `num_rows` rows, four columns a thread, and writes the
// result; or, where other blocks have keys of it too, this block's share of it.
FC_DEVICE void add_up_warps(const AttnParams& p, const BlockCoord& block,
                            SmemPtr<float> merge_smem, int num_rows, float scale_log2,
                            bool is_share) {
  constexpr int UNITS = HEAD_DIM_V / 4;  // of a row
  for (int unit = opaque(thread_idx() % 128); unit < num_rows * UNITS; unit += 128) {
    const int row = block.m_begin + unit / UNITS;
    const int col = unit % UNITS * 4;
    float out[4], row_max, sum;
    add_up_columns(merge_smem, unit / UNITS, col, scale_log2, out, row_max, sum);
    if (RETURNS_MAX_SCORE && col == 0) raise_max_score_of(p, block, row, row_max, sum);
    if (is_share) {
      const int64_t at = partial_row(p, block, block.split, row);
      Packet<16> packet;
#pragma unroll
      for (int i = 0; i < 4; ++i) packet.word[i] = to_packet(out[i]).word[0];
      gmem_store_packet(p.splits.split_out + (at * (OUT_FRAGS * 16) + col), packet);
      if (col == 0) gmem_store_packet(p.splits.split_stats + at * 2, pair_of(row_max, sum));
      continue;
    }
    const float inverse = result_factor(p, block, row, row_max, sum);
    const Packet<8> packed = {{pack2<Element>(out[0] * inverse, out[1] * inverse),
                               pack2<Element>(out[2] * inverse, out[3] * inverse)}};
    gmem_store_packet(p.tensors.out + (out_offset(p, block, row) + col), packed);
    if (!is_null(p.tensors.lse) && col == 0) store_lse(p, block, row, row_max, sum);
  }
}

// The consumer warpgroup: up to 8 STRIPS query rows of every row tile of this block. A template,
// like what it calls, as other kernels have no such tiles.
template <class Smem>
FC_DEVICE void consume_few_rows(const AttnParams& p, const Barriers& bar, const Smem& smem) {
  FewRows c;
  for (int turn = 0;; ++turn) {
    const int slot = q_slot(turn, 0);
    mbar_wait(bar.q_full + slot, q_parity(turn));
    const auto coord = coord_slot(smem.coords, turn);
    if (smem_load(coord) == NO_TILE) return;
    BlockCoord block = load_coord(coord);
    const auto& own = sequence_params(p, block);
    const int warp_row = rows_idx() * WARP_ROWS;
    const float scale_log2 = softmax_scale_log2(own);
    c.has_max = false;
#pragma unroll
    for (int s = 0; s < WARP_STRIPS; ++s) {
      Strip& strip = c.strip[s];
      load_strip(strip, smem.q[slot], warp_row + s * STRIP_ROWS);
      const bool scales_products = SCORES_ARE_SCALED || strip.differ;
      strip.scale_log2 = scale_log2 * (scales_products ? 1.0f : strip.inverse[0]);
      strip.softmax = {{NEG_INF, NEG_INF}, {0.0f, 0.0f}};
#pragma unroll
      for (int d = 0; d < OUT_PAIRS; ++d) wmma_fill(strip.out[d], 0.0f);
    }
    warp_sync();  // orders all lanes' reads before the first one gives Q back
    if (lane_idx() == 0) mbar_arrive(bar.q_empty + slot);

    const Range keys = own_keys(own, block);
    for (int n_block = keys.end - 1; n_block >= keys.begin; --n_block) {
      few_rows_of_tile(c, own, bar, smem, block.m_begin + warp_row, n_block);
    }
#pragma unroll
    for (int s = 0; s < WARP_STRIPS; ++s) {  // what follows knows nothing of factors
      Strip& strip = c.strip[s];
      const bool scales_products = SCORES_ARE_SCALED || strip.differ;
      strip.softmax.row_max[0] *= scales_products ? 1.0f : strip.inverse[0];
      strip.softmax.row_max[1] *= scales_products ? 1.0f : strip.inverse[0];
    }
    block = load_coord(coord);  // again, or it would take registers so long
    const int num_rows = min_i(STRIP_ROWS * STRIPS, own.seqlen_q - block.m_begin);
    const auto sync = [&] { named_barrier_sync(STORE_BARRIER, 128); };
    sync();  // orders reads of the row tile before ahead of these writes
    store_warp(c, smem.merge, num_rows);
    sync();  // hands the writes on to all warps
    const bool is_share = SPLIT_KV && (!STREAM_K || num_splits_of(own, block) > 1);
    add_up_warps(own, block, smem.merge, num_rows, scale_log2, is_share);
    if constexpr (SPLIT_KV) {
      if (is_share) {
        count_partial<PARTIAL_PACKETS, OUT_FRAGS>(own, block, 0, scale_log2, sync, smem.arrival);
      }
    }
  }
}
