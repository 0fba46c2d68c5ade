// bwd_delta_sm90.cuh - delta = sum(dout * out) - dlse of 64 rows, and their lse, by a warpgroup.
#pragma once

#include "prims.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "tile/softmax.cuh"
#include "bwd_sm90/bwd_sm90.cuh"

// Of the two rows that a lane has part of.
struct RowStats {
  float lse_log2[2], delta[2];
};

// lse and delta of a lane's two rows; one lane of the four that share a row writes delta for the
// kernel that follows. lse is +inf, and probabilities 0, of a row that is missing or sees no key.
// `dout` holds the 64 rows from `group_begin` on, as TMA wrote them; `seqlen_q` is the sequence's.
FC_DEVICE RowStats load_row_stats(const AttnBwdSm90Params& params, const BlockCoord& block,
                                  VGroup dout, int group_begin, int seqlen_q) {
  const AttnParams& p = params.attn;
  const GmemPtr<const float> lse_gmem = {p.tensors.lse.address};
  const GmemPtr<const Element> out_gmem = {p.tensors.out.address};
  const int first_row = PACKED ? query_rows(p, block.batch_idx).begin : 0;
  const int lane = opaque(lane_idx());
  RowStats stats;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int group_row = warp_idx() % 4 * 16 + accum_row(lane, r * 2);
    const int row = group_begin + group_row;
    const bool exists = row < seqlen_q;
    const auto out = out_gmem + out_offset(p, block, exists ? first_row + row : 0);
    float sum = 0.0f;
#pragma unroll
    for (int begin = 0; begin < HEAD_DIM_V; begin += 32) {
      const int col = begin + lane % 4 * 8;
      if (!exists || (HEAD_DIM_V % 32 != 0 && col >= HEAD_DIM_V)) continue;
      const auto o = gmem_load_packet<16>(out + col);
      const auto g = smem_load_packet<16>(dout.at(group_row, col));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum += unpacked(o.word[i], 0) * unpacked(g.word[i], 0);
        sum += unpacked(o.word[i], 1) * unpacked(g.word[i], 1);
      }
    }
    sum = quad_sum(sum);
    stats.lse_log2[r] = POS_INF;
    stats.delta[r] = 0.0f;
    if (!exists) continue;
    const int64_t at = lse_offset(p, block, first_row + row);
    const float lse_log2 = gmem_load(lse_gmem + at) * LOG2_E;
    if (lse_log2 != NEG_INF) {
      stats.lse_log2[r] = lse_log2;
      stats.delta[r] = is_null(params.dlse) ? sum : sum - gmem_load(params.dlse + at);
    }
    if (lane % 4 == 0) gmem_store(params.delta + at, stats.delta[r]);
  }
  return stats;
}
