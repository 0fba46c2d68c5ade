// mbarrier.cpp - barriers in shared memory: arrivals, bytes, phases (PTX ISA: mbarrier).
#include <cstdio>

#include "../machine.h"

namespace fc_host {

void mbarriers_reset() {
  Sm90& sm90 = machine.sm90;
  sm90.mbarriers.clear();
  sm90.mbarriers.reserve(MAX_MBARRIERS);
  sm90.mbarrier_at.assign(machine.cells.size() * CELL_BYTES / 8 + 1, -1);
}

static Epoch holder_epoch() { return make_epoch(machine.agents.barrier_cells, MAX_CLOCK); }

static void hold_cells(const MBarrier& bar) {
  for (int i = 0; i < 8 / CELL_BYTES; ++i) {
    Cell& cell = machine.cells[size_t(bar.ref.base + bar.ref.index * 8) / CELL_BYTES + size_t(i)];
    cell.write = holder_epoch();
    cell.write_site = bar.init_site;
  }
}

void mbar_init(SmemRef ref, int count, Site site) {
  Sm90& sm90 = machine.sm90;
  const int offset = shadow_locate(ref, 8, 8, false, site);
  if (sm90.mbarrier_at[size_t(offset / 8)] >= 0) {
    raise_alarm({"mbarrier", site, ref.name, ref.index}, "initialises an mbarrier once more");
  }
  if (count < 1 || count > MAX_TX_BYTES) {
    misuse(site, "mbar_init: count %d is outside 1..%d", count, MAX_TX_BYTES);
  }
  if (int(sm90.mbarriers.size()) == MAX_MBARRIERS) {
    misuse(site, "the simulator can track %d mbarriers of a block", MAX_MBARRIERS);
  }
  const int t = current_thread;
  smem_write_as(t, ref, 8, 8, site);
  MBarrier bar = {};
  bar.ref = ref;
  bar.init_thread = bar.last_issuer = t;
  bar.init = thread_epoch(t);
  bar.init_site = pack_site(site);
  bar.count = bar.pending = count;
  bar.collecting.assign(size_t(machine.num_agents), 0);
  bar.completed.assign(size_t(machine.num_agents), 0);
  sm90.mbarrier_at[size_t(offset / 8)] = int16_t(sm90.mbarriers.size());
  hold_cells(bar);
  sm90.mbarriers.push_back(std::move(bar));
}

void mbar_init_fence(Site site) { fence_proxy_async(site); }

// Index of the mbarrier, which the current thread must know to be initialised.
int mbarrier_find(const SmemRef& ref, Site site) {
  const int offset = shadow_locate(ref, 8, 8, false, site);
  const int index = machine.sm90.mbarrier_at[size_t(offset / 8)];
  if (index < 0) {
    raise_alarm({"mbarrier", site, ref.name, ref.index},
                "uses an mbarrier that is not initialised yet: no barrier orders the two");
  }
  const MBarrier& bar = machine.sm90.mbarriers[size_t(index)];
  if (!ordered(bar.init, clock_row(current_thread))) {
    set_other_thread(current_block, bar.init_thread, unpack_site(bar.init_site));
    raise_alarm({"mbarrier", site, ref.name, ref.index},
                "uses an mbarrier that another thread initialises: no barrier orders the two");
  }
  return index;
}

int mbarrier_describe(const MBarrier& bar, char* text, size_t bytes) {
  const int arrived = bar.count - bar.pending;
  const int nobody = bar.tx - bar.bytes_under_way;
  int used = std::snprintf(text, bytes, "%s[%d] in phase %d (parity %d) has %d of %d arrivals",
                           bar.ref.name, bar.ref.index, bar.phase, bar.phase & 1, arrived,
                           bar.count);
  if (size_t(used) < bytes && nobody > 0) {
    used += std::snprintf(text + used, bytes - size_t(used),
                          " and expects %d bytes that no TMA load brings", nobody);
  }
  return used;
}

static void complete_if_done(int index) {
  MBarrier& bar = machine.sm90.mbarriers[size_t(index)];
  if (bar.pending > 0 || bar.tx != 0) return;
  ++bar.phase;
  ++machine.report->barriers;
  bar.pending = bar.count;
  bar.collecting[size_t(machine.agents.mbarriers + index)] = bar.phase;
  bar.completed = bar.collecting;
  for (const int waiter : bar.waiters) set_runnable(waiter);
  bar.waiters.clear();
}

void mbarrier_complete_tx(int index, int bytes) {
  MBarrier& bar = machine.sm90.mbarriers[size_t(index)];
  bar.tx -= bytes;
  bar.bytes_under_way -= bytes;
  complete_if_done(index);
}

void mbar_expect_tx(SmemRef ref, int bytes, Site site) {
  MBarrier& bar = machine.sm90.mbarriers[size_t(mbarrier_find(ref, site))];
  if (bytes < 0 || bar.tx + bytes > MAX_TX_BYTES) {
    raise_alarm({"mbarrier", site, ref.name, ref.index},
                "announces %d bytes where %d are announced already; the count ends at %d", bytes,
                bar.tx, MAX_TX_BYTES);
  }
  bar.tx += bytes;
}

void mbar_arrive(SmemRef ref, Site site) {
  const int index = mbarrier_find(ref, site);
  MBarrier& bar = machine.sm90.mbarriers[size_t(index)];
  if (bar.pending == 0) {
    raise_alarm({"mbarrier", site, ref.name, ref.index},
                "arrives once more than the %d times of a phase that still waits for %d bytes",
                bar.count, bar.tx);
  }
  --bar.pending;
  clocks_release(current_thread, bar.collecting);
  complete_if_done(index);
  maybe_reschedule();
}

// The mbarrier whose phase of that parity the current thread asks for.
static int find_phase(SmemRef ref, int parity, Site site) {
  machine.threads[size_t(current_thread)].site = site;
  if (parity != 0 && parity != 1) misuse(site, "mbarrier: parity %d is not 0 or 1", parity);
  return mbarrier_find(ref, site);
}

// The current thread has learned which phases are complete.
static void acquire_phases(int index) {
  MBarrier& bar = machine.sm90.mbarriers[size_t(index)];
  bar.phase_waited_for = bar.phase;
  const int agent = machine.agents.mbarriers + index;
  if (clock_row(current_thread)[agent] < bar.phase) clocks_acquire(current_thread, bar.completed);
}

bool mbar_test(SmemRef ref, int parity, Site site) {
  const int index = find_phase(ref, parity, site);
  maybe_reschedule();
  const bool is_complete = (machine.sm90.mbarriers[size_t(index)].phase & 1) != parity;
  if (is_complete) acquire_phases(index);
  return is_complete;
}

void mbar_wait(SmemRef ref, int parity, Site site) {
  const int t = current_thread;
  Thread& thread = machine.threads[size_t(t)];
  const int index = find_phase(ref, parity, site);
  MBarrier& bar = machine.sm90.mbarriers[size_t(index)];
  if ((bar.phase & 1) == parity) {
    const int awaited = bar.phase;
    thread.mbarrier = index;
    bar.waiters.push_back(t);
    set_waiting(t, ThreadState::at_mbarrier);
    schedule(t);
    if (bar.phase != awaited + 1) {
      raise_alarm({"mbarrier", site, ref.name, ref.index},
                  "waits for phase %d while phase %d may complete too: of the same parity as the "
                  "phase after next, it can be missed",
                  awaited, bar.phase - 1);
    }
  } else {
    maybe_reschedule();
  }
  acquire_phases(index);
}

}  // namespace fc_host
