// fwd_sm90/consumer_sm90.cuh - a consumer warpgroup: its state, the products that it issues and
// whose turn that is, and the key tiles that it passes over.
#pragma once

#include "prims_sm90.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/float8/float8_sm90.cuh"
#include "fwd_sm90/layout_sm90.cuh"
#include "fwd_sm90/mask_tile_sm90.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"

// A consumer warpgroup's state, carried from key tile to key tile.
struct Consumer {
  int index;
  int row_group;  // of 64 rows; consumers that share one take the key tiles in turn
  int q_slot;
  int warp_row;  // first of this warp's 16 query rows
  float scale_log2;
  WmmaAccum out[OUT_FRAGS];
  bool has_out;  // or `out` is of the row tile before
  WmmaA<MathElement> probs[KEY_FRAGS];  // of the tile whose P V is not issued yet
  OnlineSoftmax softmax;
  PipelineState k_state;  // of the next K; V's, one tile of this consumer behind, follows from it
  bool k_is_there, v_is_there;  // of ask_ahead
  bool hidden;                  // P of the key tile visited last is 0; under SKIPS_HIDDEN
  MaskStrip mask;
  Queries queries;  // under FLOAT8
//@if gate
  BlockCoord block;
//@end

  FC_DEVICE PipelineState v_state() const { return {k_state.ring, k_state.count - 1}; }
};

// S = Q K^T of a warpgroup's 64 rows, issued.
FC_DEVICE void issue_scores(WmmaAccum (&scores)[KEY_FRAGS], const Consumer& c, QGroup q, KTile k,
                            int stage) {
  const WgmmaDesc q_desc = q.over_columns();
  const WgmmaDesc k_desc = k.over_columns(stage);
#pragma unroll
  for (int d = 0; d < HEAD_DIM; d += 16) {
    const auto of_k = k_desc + k.column_bytes(d);
    if constexpr (Q_IN_REGISTERS) {
      wgmma_rs_k<MathElement>(scores, c.queries.frag[d / 16], of_k, d > 0);
    } else {
      wgmma_ss<MathElement>(scores, q_desc + q.column_bytes(d), of_k, d > 0);
    }
  }
}

// O += P V of a warpgroup's 64 rows, issued. A plain call's first P V of a row tile overwrites O.
FC_DEVICE void issue_output(Consumer& c, VTile v) {
  const WgmmaDesc v_desc = v.over_rows(c.v_state().stage());
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
    const bool adds = n > 0 || !IS_PLAIN || c.has_out;
    wgmma_rs<MathElement>(c.out, c.probs[n], v_desc + v.row_bytes(n * 16), adds);
  }
  c.has_out = true;
}

FC_DEVICE void clear_output(Consumer& c) {
#pragma unroll
  for (int d = 0; d < OUT_FRAGS; ++d) wmma_fill(c.out[d], 0.0f);
}

FC_DEVICE void await_issue(const Consumer& c) { named_barrier_sync(ISSUE_BARRIER + c.index, 256); }

FC_DEVICE void hand_over_issue(const Consumer& c) {
  named_barrier_arrive(ISSUE_BARRIER + (c.index + 1) % NUM_CONSUMERS, 256);
}

FC_DEVICE void pass_issue(const Consumer& c) {
  await_issue(c);
  hand_over_issue(c);
}

// Waits for K and V of a key tile that is not computed.
FC_DEVICE void await_key_tile(const Consumer& c, const Barriers& bar) {
  mbar_wait(bar.k_full + c.k_state.stage(), c.k_state.parity());
  mbar_wait(bar.v_full + c.k_state.stage(), c.k_state.parity());
  warp_sync();  // or the next phase could pass a lane that still waits
}

// A key tile that only other consumers' rows can see.
FC_DEVICE void skip_key_tile(Consumer& c, const Barriers& bar) {
  await_key_tile(c, bar);
  release(bar.k_empty, c.k_state);
  release(bar.v_empty, c.k_state);
  ++c.k_state.count;
}

// Returns whether a predicate is true on some lane of the warpgroup. The warp's own vote says no
// more than the barrier does, but it tells the compiler that lanes agree: it would take loops that
// end by the answer for divergent, and keep their counters in registers of each lane.
FC_DEVICE bool any_of_warpgroup(const Consumer& c, bool predicate) {
  return warp_any(named_barrier_any(STORE_BARRIER + c.index, 128, predicate));
}

// Returns whether no lane of the warpgroup has added anything to a sum.
FC_DEVICE bool is_nothing(const Consumer& c, const float (&sum)[2]) {
  return !any_of_warpgroup(c, sum[0] + sum[1] != 0.0f);
}

// Returns whether the mask hides a key tile from all rows of the warpgroup.
FC_DEVICE bool is_hidden(const Consumer& c, const AttnParams& p, int n_block) {
  const bool sees = !c.mask.hides_all<KEY_FRAGS>(p, c.warp_row, n_block);
  return !any_of_warpgroup(c, sees);
}

// A key tile that is hidden like the one before it, in the place of key_tile: P of both is 0.
FC_DEVICE void hidden_key_tile(Consumer& c, const AttnParams& p, const Barriers& bar, int n_block) {
  if (PING_PONG) pass_issue(c);
  await_key_tile(c, bar);
  release(bar.k_empty, c.k_state);
  release(bar.v_empty, c.v_state());
  c.mask.fetch_next(p, c.warp_row, n_block);
  c.k_is_there = false;  // nobody has asked
  ++c.k_state.count;
}

// A consumer warp is done with the row tile's Q.
FC_DEVICE void release_q(const Consumer& c, const Barriers& bar) {
  if (lane_idx() == 0) mbar_arrive(bar.q_empty + c.q_slot);
}

// Asks whether V of this tile and K of the next have arrived. The answer takes some 70 cycles; the
// exponentials hide it. After a no, the consumer waits where it needs them.
FC_DEVICE void ask_ahead(Consumer& c, const Barriers& bar) {
  const PipelineState next = {c.k_state.ring, c.k_state.count + 1};
  c.v_is_there = mbar_test(bar.v_full + c.k_state.stage(), c.k_state.parity());
  c.k_is_there = mbar_test(bar.k_full + next.stage(), next.parity());
}
