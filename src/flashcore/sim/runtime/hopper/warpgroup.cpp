// warpgroup.cpp - named barriers, register budgets, proxy fences, elect_lane and stmatrix.
#include <algorithm>
#include <cstring>

#include "../machine.h"

namespace fc_host {

void warpgroups_reset() {
  Machine& m = machine;
  for (NamedBarrier& bar : m.sm90.named) {
    bar.threads = bar.arrived = 0;
    bar.warps = bar.waiting = 0;
    bar.clock.assign(size_t(m.num_agents), 0);
  }
  for (Warp& warp : m.warps) {
    warp.elected = int(next_random() % WARP_SIZE);
    warp.sm90.num_set_registers = warp.sm90.registers = 0;
  }
}

// --- named barriers ------------------------------------------------------------------------------

static void check_use(const NamedBarrier& bar, WarpOp op, int id, int threads, Site site) {
  const int t = current_thread;
  const bool waits = op != WarpOp::named_barrier_arrive;
  if (bar.arrived > 0 && bar.threads != threads) {
    set_other_thread(current_block, bar.first_thread, bar.site);
    raise_alarm({"named-barrier", site},
                "named barrier %d is used with %d threads while others use it with %d", id, threads,
                bar.threads);
  }
  if (bar.warps & (1u << (t / WARP_SIZE))) {
    set_other_thread(current_block, bar.first_thread, bar.site);
    raise_alarm({"named-barrier", site},
                "a warp comes to named barrier %d for the second time, and %d of its %d threads "
                "have arrived: it would stand for another warp",
                id, bar.arrived, bar.threads);
  }
  if (bar.arrived > 0 && bar.votes != (op == WarpOp::named_barrier_any)) {
    set_other_thread(current_block, bar.first_thread, bar.site);
    raise_alarm({"named-barrier", site},
                "some warps vote at named barrier %d and others do not: the result is undefined",
                id);
  }
  if (waits && bar.waiting != 0 && !same_site(bar.sync_site, site)) {
    set_other_thread(current_block, bar.sync_thread, bar.sync_site);
    raise_alarm({"named-barrier", site},
                "warps wait at named barrier %d on different lines: two uses of it overlap", id);
  }
  if (bar.arrived + WARP_SIZE > threads) {
    raise_alarm({"named-barrier", site}, "more warps come to named barrier %d than its %d threads",
                id, threads);
  }
}

static void acquire(int w, const std::vector<int32_t>& clock) {
  const int first = machine.warps[size_t(w)].first_lane;
  for (int t = first; t < first + WARP_SIZE; ++t) clocks_acquire(t, clock);
}

bool named_barrier(WarpOp op, int id, int threads, bool predicate, Site site) {
  Machine& m = machine;
  if (id < 1 || id >= NUM_NAMED_BARRIERS) {
    misuse(site, "named barrier %d is outside 1..%d (0 is block_sync's)", id,
           NUM_NAMED_BARRIERS - 1);
  }
  if (threads < WARP_SIZE || threads % WARP_SIZE || threads > m.num_threads) {
    misuse(site, "named barrier %d: %d threads are not whole warps of a block of %d", id, threads,
           m.num_threads);
  }
  const int w = current_thread / WARP_SIZE;
  const bool& result = m.warps[size_t(w)].sm90.any;
  if (!warp_arrive(op, &predicate, uint64_t(id) << 32 | uint64_t(threads), site)) return result;
  NamedBarrier& bar = m.sm90.named[id];
  check_use(bar, op, id, threads, site);
  const bool waits = op != WarpOp::named_barrier_arrive;
  if (bar.arrived == 0) {
    bar.threads = threads;
    bar.site = site;
    bar.first_thread = current_thread;
    bar.votes = op == WarpOp::named_barrier_any;
    bar.any = false;
  }
  bar.any |= warp_vote();
  bar.arrived += WARP_SIZE;
  bar.warps |= 1u << w;
  const int first = m.warps[size_t(w)].first_lane;
  for (int t = first; t < first + WARP_SIZE; ++t) clocks_release(t, bar.clock);
  if (bar.arrived == bar.threads) {
    ++m.report->barriers;
    if (waits) acquire(w, bar.clock);
    m.warps[size_t(w)].sm90.any = bar.any;
    for (int other = 0; other < m.num_warps; ++other) {
      if (!(bar.waiting & (1u << other))) continue;
      acquire(other, bar.clock);
      m.warps[size_t(other)].sm90.any = bar.any;
      wake_warp(other);
    }
    bar.arrived = 0;
    bar.warps = bar.waiting = 0;
  } else if (waits) {
    bar.waiting |= 1u << w;
    bar.sync_site = site;
    bar.sync_thread = current_thread;
    hold_warp();
  }
  warp_release();
  return result;
}

// --- register budgets ----------------------------------------------------------------------------

void set_registers(int registers, bool raise, Site site) {
  Machine& m = machine;
  const uint64_t uniform = uint64_t(registers) << 1 | uint64_t(raise);
  if (!warp_arrive(WarpOp::set_registers, nullptr, uniform, site)) return;
  const int w = current_thread / WARP_SIZE;
  WarpSm90& me = m.warps[size_t(w)].sm90;
  ++me.num_set_registers;
  me.registers = registers;
  me.registers_site = site;
  const int first = w / GROUP_WARPS * GROUP_WARPS;
  int total = 0;
  bool all_set = true;
  for (int other = 0; other < m.num_warps; ++other) {
    const WarpSm90& warp = m.warps[size_t(other)].sm90;
    total += warp.registers * WARP_SIZE;
    all_set &= warp.num_set_registers > 0;
    if (other < first || other >= first + GROUP_WARPS) continue;
    if (warp.num_set_registers == me.num_set_registers && warp.registers != registers) {
      set_other_thread(current_block, other * WARP_SIZE, warp.registers_site);
      raise_alarm({"divergence", site},
                  "warps of one warpgroup set different numbers of registers, %d and %d", registers,
                  warp.registers);
    }
  }
  if (all_set && total > 65536) {
    misuse(site, "the warps of this block hold %d registers together, an SM has 65536", total);
  }
  warp_release();
}

void warpgroups_check_block_end() {
  const Machine& m = machine;
  for (int w = 0; w < m.num_warps; ++w) {
    const WarpSm90& warp = m.warps[size_t(w)].sm90;
    const WarpSm90& first = m.warps[size_t(w / GROUP_WARPS * GROUP_WARPS)].sm90;
    if (warp.num_set_registers == first.num_set_registers) continue;
    const bool more = warp.num_set_registers > first.num_set_registers;
    current_thread = (more ? w : w / GROUP_WARPS * GROUP_WARPS) * WARP_SIZE;
    defer_alarm({"divergence", more ? warp.registers_site : first.registers_site, "", -1, -1, true},
                "only some warps of a warpgroup set their number of registers here");
    return;
  }
}

// --- the rest ------------------------------------------------------------------------------------

// What the thread knows of anybody's writes, its own among them, is visible to asynchronous units;
// its own later ones are of another tick.
void fence_proxy_async(Site) {
  const int t = current_thread;
  int32_t* clock = clock_row(t);
  std::copy_n(clock, machine.num_threads, clock + machine.agents.fenced);
  clocks_tick(t);
}

bool elect_lane(Site site) {
  if (warp_arrive(WarpOp::elect_lane, nullptr, 0, site)) warp_release();
  const int t = current_thread;
  return t % WARP_SIZE == machine.warps[size_t(t / WARP_SIZE)].elected;
}

struct MatrixRow {
  SmemRef ref;
  const uint32_t* reg;
};

void store_matrices(SmemRef row, const uint32_t (&reg)[4], Site site) {
  MatrixRow mine = {row, reg};
  if (!warp_arrive(WarpOp::stmatrix, &mine, 0, site)) return;
  const int first = machine.warps[size_t(current_thread / WARP_SIZE)].first_lane;
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    const auto& place = *static_cast<MatrixRow*>(warp_argument(lane));
    uint32_t packed[4];
    for (int i = 0; i < 4; ++i) {
      const int from = lane % 8 * 4 + i;
      packed[i] = static_cast<MatrixRow*>(warp_argument(from))->reg[lane / 8];
    }
    std::memcpy(smem_write_as(first + lane, place.ref, 16, 16, site), packed, 16);
  }
  warp_release();
}

struct LoadedRow {
  uint16_t element[8];
  uint32_t (*reg)[4];
};

void load_matrices(SmemRef row, uint32_t (&reg)[4], bool transposed, Site site) {
  LoadedRow mine;
  std::memcpy(mine.element, smem_read(row, 16, site), 16);
  mine.reg = &reg;
  if (!warp_arrive(WarpOp::ldmatrix, &mine, uint64_t(transposed), site)) return;
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const auto element = [&](int r, int c) -> uint32_t {
        return static_cast<LoadedRow*>(warp_argument(m * 8 + r))->element[c];
      };
      const int r = lane / 4;
      const int c = lane % 4 * 2;
      const uint32_t low = transposed ? element(c, r) : element(r, c);
      const uint32_t high = transposed ? element(c + 1, r) : element(r, c + 1);
      (*static_cast<LoadedRow*>(warp_argument(lane))->reg)[m] = low | high << 16;
    }
  }
  warp_release();
}

}  // namespace fc_host
