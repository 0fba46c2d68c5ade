// runtime.cpp - the runtime as one translation unit, compiled once and linked to every kernel, and
// the two functions that sim/run.py calls.
#include <cstdio>

#include "alarm.cpp"
#include "async.cpp"
#include "between_blocks.cpp"
#include "clocks.cpp"
#include "fiber.cpp"
#include "global.cpp"
#include "scheduler.cpp"
#include "shadow.cpp"
#include "hopper/mbarrier.cpp"
#include "hopper/tma.cpp"
#include "hopper/warpgroup.cpp"
#include "hopper/wgmma.cpp"

extern "C" unsigned long long fc_kernel_params_bytes();
extern "C" int fc_kernel_is_sm90();

namespace fc_host {

void multiply_16x16x16(float* accum, const float* a, const float* b) {
  for (int m = 0; m < 16; ++m) {
    float row[16];
    for (int n = 0; n < 16; ++n) row[n] = accum[m * 16 + n];
    for (int k = 0; k < 16; ++k) {
      const float x = a[m * 16 + k];
      for (int n = 0; n < 16; ++n) row[n] += x * b[k * 16 + n];
    }
    for (int n = 0; n < 16; ++n) accum[m * 16 + n] = row[n];
  }
}

static void start(const FcLaunch& launch, FcReport& report) {
  Machine& m = machine;
  m.launch = launch;
  m.report = &report;
  m.num_threads = launch.num_threads;
  m.num_warps = launch.num_threads / WARP_SIZE;
  m.is_sm90 = fc_kernel_is_sm90() != 0;
  m.num_agents = m.num_threads + m.num_warps;
  m.agents.warps = m.num_threads;
  if (m.is_sm90) {
    const auto add = [&m](int& first, int count) {
      first = m.num_agents;
      m.num_agents += count;
    };
    add(m.agents.fenced, m.num_threads);
    add(m.agents.products, m.num_warps);
    add(m.agents.groups, m.num_warps / GROUP_WARPS);
    add(m.agents.mbarriers, MAX_MBARRIERS);
    add(m.agents.stores, MAX_STORERS);
    add(m.agents.barrier_cells, 1);
  }
  num_blocks = launch.grid;
  m.random_state = launch.seed;
  m.stopped = false;
  m.room = 0;
  m.deferred = {};
  m.files.clear();
  m.last_file = nullptr;
  between_blocks_start();
}

static Block room_for_block() {
  const Machine& m = machine;
  Block block;
  block.stacks = std::make_unique<FiberStacks>(m.num_threads);
  block.threads.resize(size_t(m.num_threads));
  block.warps.resize(size_t(m.num_warps));
  constexpr size_t ALIGNMENT = 1024;
  block.smem_storage.resize(size_t(m.launch.smem_bytes) + ALIGNMENT);
  const auto address = reinterpret_cast<uintptr_t>(block.smem_storage.data());
  block.smem = block.smem_storage.data() + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
  block.cells.resize(size_t(m.launch.smem_bytes) / CELL_BYTES);
  return block;
}

static bool can_go_on(const Block& halted) {
  bool can = halted.runnable_warps != 0;
  for (const CounterWait& wait : halted.waits) can |= *wait.place == wait.value;
  return can;
}

// Runs blocks in an order, one after the other; or, while some have halted, any of these that can
// go on, or the next one, if there is room for it, until all have ended.
static void run_blocks(const std::vector<int>& order) {
  Machine& m = machine;
  Block& running = m;
  std::vector<Block> halted, ended;
  for (size_t begun = 0; begun < order.size() || !halted.empty();) {
    const bool has_room = m.room == 0 || halted.empty() || int(halted.size()) < m.room;
    const bool may_begin = begun < order.size() && has_room;
    m.num_others = int(order.size() - begun + halted.size()) - 1;
    std::vector<size_t> ready;
    for (size_t i = 0; i < halted.size(); ++i) {
      if (can_go_on(halted[i])) ready.push_back(i);
    }
    const size_t choices = ready.size() + (may_begin ? 1 : 0);
    size_t next = 0;  // stuck, if there is no choice
    if (choices > 0) {
      next = halted.empty() ? 0 : next_random() % choices;
      next = next == ready.size() ? halted.size() : ready[next];
    }
    if (next == halted.size()) {
      if (ended.empty()) ended.push_back(room_for_block());
      running = std::move(ended.back());
      ended.pop_back();
      begin_block(order[begun++]);
    } else {
      running = std::move(halted[next]);
      m.is_stuck = choices == 0;
      halted.erase(halted.begin() + std::ptrdiff_t(next));
    }
    run_block();
    if (m.stopped) break;
    (m.has_halted ? halted : ended).push_back(std::move(running));
  }
  running = {};  // its stacks last no longer than the run
}

}  // namespace fc_host

#define FC_EXPORT extern "C" __attribute__((visibility("default")))

FC_EXPORT unsigned long long fc_sim_params_bytes() { return fc_kernel_params_bytes(); }

// Runs every block of a launch, in an order that the seed fixes, until the first alarm.
FC_EXPORT void fc_sim_run(const FcLaunch* launch, FcReport* report) {
  using namespace fc_host;
  start(*launch, *report);
  if (machine.num_agents > 1 << AGENT_BITS) {
    std::snprintf(report->kind, sizeof report->kind, "misuse");
    std::snprintf(report->message, sizeof report->message,
                  "a block of %d threads with mbarriers is more than the simulator can track",
                  launch->num_threads);
    return;
  }
  std::vector<int> order(size_t(launch->grid));
  for (int i = 0; i < launch->grid; ++i) order[size_t(i)] = i;
  for (int i = launch->grid - 1; i > 0; --i) {
    std::swap(order[size_t(i)], order[next_random() % uint64_t(i + 1)]);
  }
  run_blocks(order);
}
