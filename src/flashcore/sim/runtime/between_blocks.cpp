// between_blocks.cpp - the threads that may read in global memory what another block wrote.
//
// Blocks run one after the other, or halt where they poll, so values alone would never show that an
// order is missing. The order is that of the PTX ISA's memory model, as far as kernels here need
// it: an acquiring and releasing atomic on a counter leaves there what its thread knows, and makes
// known to the thread what others left; barriers hand that on inside the block. Knowledge of a
// block is the clocks of its threads.
#include <algorithm>
#include <map>
#include <utility>

#include "machine.h"

namespace fc_host {

static std::map<uint64_t, Blocks> counters;  // by address

void between_blocks_start() { counters.clear(); }
void between_blocks_reset() { machine.acquisitions.clear(); }

static void learn(Blocks& known, int block, const Clocks& clocks) {
  for (auto& [other, theirs] : known) {
    if (other != block) continue;
    for (size_t t = 0; t < clocks.size(); ++t) theirs[t] = std::max(theirs[t], clocks[t]);
    return;
  }
  known.emplace_back(block, clocks);
}

void meet_blocks(uint64_t address) {
  const int me = current_thread;
  Blocks& known = counters[address];
  const Clocks mine(clock_row(me), clock_row(me) + machine.num_threads);
  clocks_tick(me);  // what the thread does from here on comes after what it leaves
  machine.acquisitions.push_back({thread_epoch(me), known});
  learn(known, current_block, mine);
}

void learn_of_blocks(uint64_t address) {
  clocks_tick(current_thread);
  machine.acquisitions.push_back({thread_epoch(current_thread), counters[address]});
}

void release_to_blocks(uint64_t address) {
  const int me = current_thread;
  learn(counters[address], current_block,
        Clocks(clock_row(me), clock_row(me) + machine.num_threads));
  clocks_tick(me);
}

void await_counter(uint64_t address, int value, Site site) {
  Machine& m = machine;
  const int me = current_thread;
  const auto* place = static_cast<const int32_t*>(gmem_atomic(address, 4, site));
  m.threads[size_t(me)].site = site;
  if (m.room == 0) m.room = 2 + int(next_random() % uint64_t(num_blocks));
  let_blocks_run();
  if (*place != value) {
    m.waits.push_back({me, place, value});
    set_waiting(me, ThreadState::at_counter);
    schedule(me);
  }
  learn_of_blocks(address);
  Access& access = m.threads[size_t(me)].access;  // the counter may be one of the kernel before
  if (access == Access::all_but_late) access = Access::all;
}

void wake_at_counters() {
  auto& waits = machine.waits;
  const auto goes_on = [](const CounterWait& wait) {
    if (*wait.place != wait.value) return false;
    set_runnable(wait.thread);
    return true;
  };
  waits.erase(std::remove_if(waits.begin(), waits.end(), goes_on), waits.end());
}

void fence_proxy_async_global(Site) {
  for (Acquisition& acquisition : machine.acquisitions) {
    if (agent_of(acquisition.epoch) == current_thread) acquisition.fenced = true;
  }
}

bool known_of_block(int block, int thread, int clock, bool by_tma) {
  const int32_t* mine = clock_row(current_thread);
  if (block == current_block && mine[thread] >= clock) return true;
  for (const Acquisition& acquisition : machine.acquisitions) {
    if (by_tma && !acquisition.fenced) continue;
    if (!ordered(acquisition.epoch, mine)) continue;
    for (const auto& [other, clocks] : acquisition.known) {
      if (other == block && clocks[size_t(thread)] >= clock) return true;
    }
  }
  return false;
}

}  // namespace fc_host
