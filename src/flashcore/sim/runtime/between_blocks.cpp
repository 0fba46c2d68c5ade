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

bool known_of_block(int block, int thread, int clock) {
  const int32_t* mine = clock_row(current_thread);
  if (block == current_block) return mine[thread] >= clock;
  for (const Acquisition& acquisition : machine.acquisitions) {
    if (!ordered(acquisition.epoch, mine)) continue;
    for (const auto& [other, clocks] : acquisition.known) {
      if (other == block && clocks[size_t(thread)] >= clock) return true;
    }
  }
  return false;
}

}  // namespace fc_host
