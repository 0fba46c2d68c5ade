// bwd_sm90/bwd_sm90.cuh - what the two backward kernels for Hopper share: their argument, products
// of a warpgroup's 64 rows, probabilities from scores and lse, and 64 rows on their way to global
// memory.
//
// With s = softcap(scale * q.k) and p = exp(s + mask - lse), which is the softmax, the gradient of
// a score is (FlashAttention-2, arXiv:2307.08691, algorithm 2)
//
//   ds = p * (dout.v - delta) * softcap'        delta = sum(dout * out) - dlse of the row
//
// and dv = p^T dout, dq = scale * ds k, dk = scale * ds^T q. One kernel computes dq and delta, with
// the forward's shape (attn_bwd_dq_sm90.cuh); the other one dk and dv (attn_bwd_dkdv_sm90.cuh).
// Both compute s and dout.v: seven products where five would do, but no element is written twice,
// so nothing has to be added up between blocks. With ALSO_DQ the latter kernel computes all three.
#pragma once

#include "prims_sm90.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_varlen.cuh"
#include "tile/sequence.cuh"
#include "tile/smem_tile.cuh"
#include "fwd_sm90/schedule_sm90.cuh"

// The gradient of an additive mask; read only by attn_bwd_dmask_sm90.cuh.
struct MaskGradient {
  int32_t batch, heads;  // of it: 1 where it is summed
  int32_t num_shares;    // that its sums are divided into
  int32_t row_stride;    // of it, or of a share
};

// Mirrored by kernels/bwd_sm90/params.py. Boxes of q, k, v and dout are those of the kernel at
// hand.
struct AttnBwdSm90Params {
  TensorMap q_map, k_map, v_map, dout_map;
  TensorMap dq_map, dk_map, dv_map;  // boxes of 64 rows x CHUNK columns
  AttnParams attn;                   // out and lse are the forward's
  TileSchedule schedule;
  GmemPtr<const float> dlse;  // as lse, or null for zero
  GmemPtr<float> delta;       // as lse
  GmemPtr<float> dq_sums;     // see sums_of; read only where several blocks add up dQ
  GmemPtr<MaskElement> dmask;    // [batch, heads, seqlen_q or 1, seqlen_k] of MaskGradient
  GmemPtr<float> dmask_shares;   // instead, [num_shares, batch, heads, seqlen_q or 1, row_stride]
  MaskGradient mask_gradient;
  GmemPtr<int32_t> dq_turns;    // see turns_of
  int32_t first_head_q;         // of all batches' heads, the first that the launch takes: of q,
  int32_t first_head_kv;        // of k and v; read only where several blocks add up dQ
  // Where the kernel of dK and dV runs beside that of dQ: rows whose delta has been written, and
  // blocks that have waited for all of them. Null where it runs behind.
  GmemPtr<int32_t> delta_count;
};

// 64 rows of a warpgroup: of Q, K or their gradients, and of V, dO or dV.
using QkGroup = SmemTile<64, HEAD_DIM>;
using VGroup = SmemTile<64, HEAD_DIM_V>;
constexpr int QK_CHUNKS = QkGroup::CHUNKS;
constexpr int V_CHUNKS = VGroup::CHUNKS;
constexpr int QK_FRAGS = (HEAD_DIM + 15) / 16;  // the last chunk's other columns are padding
constexpr int V_FRAGS = (HEAD_DIM_V + 15) / 16;
#define POS_INF (-NEG_INF)

// Of the tiles that went through a ring of stages; see PipelineState in pipeline_sm90.cuh.
template <int STAGES>
FC_DEVICE int stage_of(uint32_t count) {
  return int(count % STAGES);
}
template <int STAGES>
FC_DEVICE int parity_of(uint32_t count) {
  return int(count / STAGES % 2);
}

// The tiles of a block, one after the other.
template <bool OWNS_KEYS, bool FROM_FEED = PACKED>
FC_DEVICE auto own_tiles(const AttnParams& p, const Feed& feed) {
  if constexpr (FROM_FEED) {
    return TileFeed<OWNS_KEYS>(p, feed);
  } else {
    return TileWalk();
  }
}

// The place in a slot of the ring of coordinates; m_begin is NO_TILE behind the last.
FC_DEVICE BlockCoord coord_or_end(SmemPtr<int32_t> slot) {
  BlockCoord block = {};
  block.m_begin = smem_load(slot);
  return block.m_begin == NO_TILE ? block : load_coord(slot);
}

// A consumer warp is done with what a barrier guards.
FC_DEVICE void arrive_for_warp(SmemPtr<uint64_t> empty) {
  if (lane_idx() == 0) mbar_arrive(empty);
}

// out = A B^T of 64 rows of A and ROWS_B rows of B, DIM columns each, issued.
template <int DIM, int ROWS_B, int FRAGS>
FC_DEVICE void issue_scores(WmmaAccum (&out)[FRAGS], WgmmaDesc a_desc, WgmmaDesc b_desc) {
#pragma unroll
  for (int d = 0; d < DIM; d += 16) {
    wgmma_ss<Element>(out, a_desc + SmemTile<64, DIM>::column_bytes(d),
                      b_desc + SmemTile<ROWS_B, DIM>::column_bytes(d), d > 0);
  }
}

// out += A B, A from registers, B's rows contiguous; issued.
template <int FRAGS, int K_FRAGS>
FC_DEVICE void issue_gradient(WmmaAccum (&out)[FRAGS], const WmmaA<Element> (&a)[K_FRAGS],
                              WgmmaDesc b_desc) {
#pragma unroll
  for (int n = 0; n < K_FRAGS; ++n) {
    wgmma_rs<Element>(out, a[n], b_desc + n * 16 * CHUNK_BYTES, true);
  }
}

// One of two elements side by side in a register.
FC_DEVICE float unpacked(uint32_t pair, int i) {
  return to_float(from_packet<Element>(Packet<2>{{i == 0 ? pair & 0xffffu : pair >> 16}}));
}

template <int FRAGS>
FC_DEVICE void clear(WmmaAccum (&x)[FRAGS]) {
#pragma unroll
  for (int n = 0; n < FRAGS; ++n) wmma_fill(x[n], 0.0f);
}

// A score's mask: whether the key is visible, and what an additive mask adds.
struct ScoreMask {
  bool visible;
  float bias;  // natural units; read only where the mask tensor is additive
};

FC_DEVICE ScoreMask as_score_mask(bool attend) { return {attend, 0.0f}; }

template <class T>
FC_DEVICE ScoreMask as_score_mask(T bias) {
  return {true, to_float(bias)};
}

// log2 of the probability of a score without soft-capping.
FC_DEVICE float log2_probability(float score, float lse_log2, const AttnParams& p, float bias) {
  if constexpr (MASK_KIND == 2) {
    return fma_rn(fma_rn(score, p.softmax_scale, bias), LOG2_E, -lse_log2);
  } else {
    return fma_rn(score, p.softmax_scale_log2, -lse_log2);
  }
}

// The probability of one score q.k, and that times soft-capping's derivative.
// `lse_log2` is in log2 units, +inf for a row that sees nothing or is none.
struct Probability {
  float p, times_cap;
};

FC_DEVICE Probability probability(float score, float lse_log2, const AttnParams& p,
                                  ScoreMask mask) {
  float log2_prob;
  float cap_slope = 1.0f;
  if constexpr (HAS_SOFTCAP) {
    const float x = score * p.softmax_scale;
    const float s = SOFTCAP_IS_LARGE ? capped_exactly(x, p.softcap) : capped(x, p.softcap);
    const float t = s * rcp_approx(p.softcap);
    cap_slope = fma_rn(-t, t, 1.0f);
    log2_prob = fma_rn(MASK_KIND == 2 ? s + mask.bias : s, LOG2_E, -lse_log2);
  } else {
    log2_prob = log2_probability(score, lse_log2, p, mask.bias);
  }
  const float exponential = exp2_approx(log2_prob);
  const float prob = mask.visible ? exponential : 0.0f;
  return {prob, HAS_SOFTCAP ? prob * cap_slope : prob};
}

// Where blocks add up dQ of 64 rows in float32, all groups of 64 of a head side by side: not row by
// row, but as an accumulator's registers lie in the threads of a warpgroup. There is room for the
// heads of the launch.
constexpr int SUMS_OF_FRAG = 8 * 32;
constexpr int SUMS_OF_WARP = QK_FRAGS * SUMS_OF_FRAG;
constexpr int SUMS_OF_GROUP = 4 * SUMS_OF_WARP;

FC_DEVICE GmemPtr<float> sums_of(const AttnBwdSm90Params& params, int batch, int head, int row) {
  const AttnParams& p = params.attn;
  const int groups_of_head = (p.seqlen_q + 63) / 64;
  const int own_head = batch * p.num_heads_q + head - params.first_head_q;
  return params.dq_sums + (int64_t(own_head) * groups_of_head + row / 64) * SUMS_OF_GROUP;
}

// How many blocks have added to 64 rows, if these are ORDERED. There are counters of all heads.
FC_DEVICE GmemPtr<int32_t> turns_of(const AttnBwdSm90Params& params, int batch, int head,
                                    int row) {
  const AttnParams& p = params.attn;
  const int groups_of_head = (p.seqlen_q + 63) / 64;
  const int64_t group = int64_t(batch * p.num_heads_q + head) * groups_of_head + row / 64;
  return params.dq_turns + group;
}

// Within a warp's part of that: four registers of a lane, half a fragment.
FC_DEVICE int place_of_sums(int frag, int half) {
  return ((frag * 2 + half) * 32 + lane_idx()) * 4;
}

// Where 64 rows go: a tensor, the box of their sequence there, the first of them and the head.
struct RowsInTensor {
  const TensorMap& map;
  BoxOrigin box;
  int first_row, head;
  bool exist = true;  // or there is none: a packed sequence ends before
};

// The thread that sends a warpgroup's rows on their way waits until these have been read from
// shared memory.
FC_DEVICE void await_stores() {
  if (warp_idx() % 4 == 0 && elect_lane()) tma_store_wait_read<0>();
}

// Rounds 64 rows times `scale` and sends them on their way by TMA, which clips rows and columns
// past the end of the tensor, or of a packed sequence. They go through `tile`; `barrier` is the
// warpgroup's own. PENDING of what was sent before, the newest, may still be on their way.
template <int PENDING = 0, int FRAGS, class Tile>
FC_DEVICE void store_rows(const WmmaAccum (&x)[FRAGS], float scale, const Tile& tile,
                          const RowsInTensor& to, int barrier) {
  static_assert(Tile::CHUNKS == (FRAGS * 16 + CHUNK - 1) / CHUNK, "the tile is that of the rows");
  // Opaque, or what is computed from them once for all tiles lives on in between.
  const int warp = opaque(warp_idx()) % 4;
  const int lane = opaque(lane_idx());
  const bool leads = warp == 0 && elect_lane();
  if (leads) tma_store_wait_read<PENDING>();  // of what lay here before
  named_barrier_sync(barrier, 128);           // orders that before the writes below
  const int row = warp * 16 + lane % 16;
#pragma unroll
  for (int d = 0; d < FRAGS; ++d) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      packed[i / 2] = pack2<Element>(x[d].x[i] * scale, x[d].x[i + 1] * scale);
    }
    stmatrix_x4(tile.at(row, d * 16, lane / 16 * 8), packed);
  }
  fence_proxy_async();
  named_barrier_sync(barrier, 128);  // orders the writes above before the stores
  if (leads) {
    for (int c = 0; to.exist && c < Tile::CHUNKS; ++c) {
      tma_store(to.map, tile.chunk(c), c * CHUNK, to.box.row + to.first_row, to.head,
                to.box.batch);
    }
    tma_store_commit();
  }
}

// The same through the place of an operand that nobody reads any more; then that is released.
template <int FRAGS, class Tile>
FC_DEVICE void store_in_place(const WmmaAccum (&x)[FRAGS], float scale, const Tile& tile,
                              const RowsInTensor& to, int barrier, SmemPtr<uint64_t> empty) {
  store_rows(x, scale, tile, to, barrier);
  await_stores();
  named_barrier_sync(barrier, 128);  // orders that before the operand's next load
  arrive_for_warp(empty);
}
