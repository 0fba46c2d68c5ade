// between_blocks.cpp - who may read in global memory what another block wrote.
//
// Blocks run one after the other, so values alone would never show that an order is missing. The
// order is that of the PTX ISA's memory model, as far as kernels here need it: what a thread knew
// at its last fence is published by its atomics to a counter that follow; another block's atomic to
// the counter finds it, and the fence after that makes it known to its thread, from there by
// barriers to others. What is known of a block are the clocks of its threads.
#include <algorithm>
#include <map>
#include <utility>

#include "machine.h"

namespace fc_host {

using Clocks = std::vector<int32_t>;                 // of the threads of a block
using Blocks = std::vector<std::pair<int, Clocks>>;  // block and what is known of it

struct Acquisition {
  Epoch epoch;  // of the fence
  Blocks known;
};

struct Fences {
  Clocks published;  // by the next atomics; empty before the first fence
  Blocks found;      // by atomics since the last fence
};

static std::map<uint64_t, Blocks> counters;    // by address
static std::vector<Fences> fences;             // of the threads of this block
static std::vector<Acquisition> acquisitions;  // of this block

void between_blocks_start() { counters.clear(); }

void between_blocks_reset() {
  fences.assign(size_t(machine.num_threads), {});
  acquisitions.clear();
}

static void learn(Blocks& known, int block, const Clocks& clocks) {
  for (auto& [other, theirs] : known) {
    if (other != block) continue;
    for (size_t t = 0; t < clocks.size(); ++t) theirs[t] = std::max(theirs[t], clocks[t]);
    return;
  }
  known.emplace_back(block, clocks);
}

void gmem_fence() {
  const int me = current_thread;
  Fences& own = fences[size_t(me)];
  own.published.assign(clock_row(me), clock_row(me) + machine.num_threads);
  clocks_tick(me);  // later writes are not published
  if (own.found.empty()) return;
  acquisitions.push_back({thread_epoch(me), std::move(own.found)});
  own.found.clear();
}

void between_blocks_atomic(uint64_t address) {
  Fences& own = fences[size_t(current_thread)];
  Blocks& known = counters[address];
  for (const auto& [block, clocks] : known) {
    if (block != current_block) learn(own.found, block, clocks);
  }
  if (!own.published.empty()) learn(known, current_block, own.published);
}

bool known_of_block(int block, int thread, int clock) {
  const int32_t* mine = clock_row(current_thread);
  if (block == current_block) return mine[thread] >= clock;
  for (const Acquisition& acquisition : acquisitions) {
    if (!ordered(acquisition.epoch, mine)) continue;
    for (const auto& [other, clocks] : acquisition.known) {
      if (other == block && clocks[size_t(thread)] >= clock) return true;
    }
  }
  return false;
}

}  // namespace fc_host
