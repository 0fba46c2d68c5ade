// Two warpgroups with different register budgets pass values to and fro by named barriers, of which
// one side only arrives; elect_lane picks one lane, always the same; warpgroups vote.
#pragma once

#include "prims_sm90.cuh"

struct WarpgroupsParams {
  GmemPtr<int32_t> seen;     // [ROUNDS, 128]: what the second warpgroup reads
  GmemPtr<int32_t> elected;  // [8, 32]: how often, of two times
  GmemPtr<int32_t> votes;    // [256]: bit r: what the warpgroup's vote came to in round r
};

constexpr int ROUNDS = 6;
enum { FILLED = 1, READ = 2, PAIR = 3, VOTE = 5 };

FC_KERNEL(warpgroups, 256, 1)(const WarpgroupsParams p) {
  const auto values = smem_view<int32_t>(0, 128, "values");
  const int me = thread_idx() % 128;
  if (warp_idx() < 4) {
    lower_registers<40>();
    for (int round = 0; round < ROUNDS; ++round) {
      if (round > 0) named_barrier_sync(READ, 256);
      smem_store(values + me, round * 1000 + me);
      named_barrier_arrive(FILLED, 256);
    }
  } else {
    raise_registers<232>();
    for (int round = 0; round < ROUNDS; ++round) {
      named_barrier_sync(FILLED, 256);
      gmem_store(p.seen + (round * 128 + me), smem_load(values + (127 - me)));
      if (round < ROUNDS - 1) named_barrier_arrive(READ, 256);
    }
    // Pairs of warps with a barrier of their own.
    named_barrier_sync(PAIR + warp_idx() % 2, 64);
  }
  int votes = 0;
  for (int round = 0; round < ROUNDS; ++round) {  // even: a thread of the first warpgroup is for it
    const bool vote = thread_idx() == round % 2 * 128 + round / 2 * 20 + 7;
    votes |= int(named_barrier_any(VOTE + warp_idx() / 4, 128, vote)) << round;
  }
  gmem_store(p.votes + thread_idx(), votes);
  const int count = int(elect_lane()) + int(elect_lane());
  gmem_store(p.elected + thread_idx(), count);
}
