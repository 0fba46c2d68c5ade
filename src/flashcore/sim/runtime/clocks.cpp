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

// Returns whether a vector clock covers all lanes' clocks of a warp's snapshot `number`, from 1 on.
static bool covers(const int32_t* clock, const Warp& warp, int number) {
  const int32_t* lanes = warp.snapshots.data() + size_t(number - 1) * WARP_SIZE;
  for (int l = 0; l < WARP_SIZE; ++l) {
    if (clock[warp.first_lane + l] < lanes[l]) return false;
  }
  return true;
}

// Components that follow from others: a warp's wmma loads from its lanes, a warpgroup's products
// from its warps.
void clocks_derive(int32_t* clock) {
  const Machine& m = machine;
  for (int w = 0; w < m.num_warps; ++w) {
    const Warp& warp = m.warps[size_t(w)];
    int32_t& seen = clock[warp_agent(w)];
    const int taken = int(warp.snapshots.size()) / WARP_SIZE;
    while (seen < taken && covers(clock, warp, seen + 1)) ++seen;
  }
  if (!m.is_sm90) return;
  for (int g = 0; g < m.num_warps / GROUP_WARPS; ++g) {
    const int32_t* products = clock + m.agents.products + g * GROUP_WARPS;
    clock[m.agents.groups + g] = *std::min_element(products, products + GROUP_WARPS);
  }
}

// A thread's later events are told apart from its earlier ones.
void clocks_tick(int thread) {
  int32_t& own = clock_row(thread)[thread];
  if (own == MAX_CLOCK) {
    misuse(machine.threads[size_t(current_thread)].site,
           "a thread passes %d barriers, all that the simulator can count", MAX_CLOCK);
  }
  ++own;
  machine.warps[size_t(thread / WARP_SIZE)].snapshot_is_stale = true;
}

static void raise_to(int32_t* clock, const int32_t* other) {
  const auto agents = size_t(machine.num_agents);
  for (size_t a = 0; a < agents; ++a) clock[a] = std::max(clock[a], other[a]);
}

void clocks_release(int thread, std::vector<int32_t>& into) {
  raise_to(into.data(), clock_row(thread));
  clocks_tick(thread);
}

void clocks_acquire(int thread, const std::vector<int32_t>& from) {
  raise_to(clock_row(thread), from.data());
  clocks_derive(clock_row(thread));
  machine.warps[size_t(thread / WARP_SIZE)].snapshot_is_stale = true;
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
  clocks_derive(joined);
  for (int t = first; t < first + count; ++t) {
    std::copy_n(joined, agents, clock_row(t));
    clocks_tick(t);
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
