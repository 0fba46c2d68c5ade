// clocks.cpp - vector clocks of the threads, and warps as agents of their own.
#include <algorithm>

#include "machine.h"

namespace fc_host {

void clocks_reset() {
  Machine& m = machine;
  m.clocks.assign(size_t(m.num_threads) * size_t(m.num_agents), 0);
  m.joined.assign(size_t(m.num_agents), 0);
  for (int t = 0; t < m.num_threads; ++t) clock_row(t)[t] = 1;
  for (Warp& warp : m.warps) {
    warp.snapshot_is_stale = true;
    warp.snapshots.clear();
    warp.seen_by_all.assign(size_t(m.num_agents), 0);
  }
}

// Whether a vector clock covers every lane's clock of a warp's snapshot `number` (counted from 1).
static bool covers(const int32_t* clock, const Warp& warp, int number) {
  const int32_t* lanes = warp.snapshots.data() + size_t(number - 1) * WARP_SIZE;
  for (int l = 0; l < WARP_SIZE; ++l) {
    if (clock[warp.first_lane + l] < lanes[l]) return false;
  }
  return true;
}

// `count` threads from `first` on learn all that any of them knows, and start a new clock tick.
static void join(int first, int count) {
  Machine& m = machine;
  const auto agents = size_t(m.num_agents);
  int32_t* joined = m.joined.data();
  std::copy_n(clock_row(first), agents, joined);
  for (int t = first + 1; t < first + count; ++t) {
    const int32_t* row = clock_row(t);
    for (size_t a = 0; a < agents; ++a) joined[a] = std::max(joined[a], row[a]);
  }
  for (int w = 0; w < m.num_warps; ++w) {
    const Warp& warp = m.warps[size_t(w)];
    int32_t& seen = joined[warp_agent(w)];
    const int taken = int(warp.snapshots.size()) / WARP_SIZE;
    while (seen < taken && covers(joined, warp, seen + 1)) ++seen;
  }
  for (int t = first; t < first + count; ++t) {
    int32_t* row = clock_row(t);
    const int32_t own = row[t];
    if (own == MAX_CLOCK) {
      misuse(m.threads[size_t(current_thread)].site,
             "a thread passes %d barriers, all that the "
             "simulator can count",
             MAX_CLOCK);
    }
    std::copy_n(joined, agents, row);
    row[t] = own + 1;
  }
  for (int w = first / WARP_SIZE; w < (first + count) / WARP_SIZE; ++w) {
    m.warps[size_t(w)].snapshot_is_stale = true;
  }
}

void clocks_join_warp(int warp) { join(warp * WARP_SIZE, WARP_SIZE); }
void clocks_join_block() { join(0, machine.num_threads); }

// Epoch of an access by the whole warp now. A new snapshot is taken only when a lane's clock moved.
Epoch warp_snapshot(int w) {
  Machine& m = machine;
  Warp& warp = m.warps[size_t(w)];
  if (warp.snapshot_is_stale) {
    warp.snapshot_is_stale = false;
    for (int l = 0; l < WARP_SIZE; ++l) {
      const int t = warp.first_lane + l;
      warp.snapshots.push_back(clock_row(t)[t]);
    }
    auto& seen = warp.seen_by_all;
    std::copy_n(clock_row(warp.first_lane), seen.size(), seen.begin());
    for (int l = 1; l < WARP_SIZE; ++l) {
      const int32_t* row = clock_row(warp.first_lane + l);
      for (size_t a = 0; a < seen.size(); ++a) seen[a] = std::min(seen[a], row[a]);
    }
    // The warp's accesses are in program order among themselves.
    seen[size_t(warp_agent(w))] = MAX_CLOCK;
  }
  return make_epoch(warp_agent(w), int(warp.snapshots.size()) / WARP_SIZE);
}

}  // namespace fc_host
