// scheduler.cpp - runs the fibers of one block. A fiber goes on until it has to wait for others; a
// seeded generator then picks who is next, so the seed fixes the whole run.
#include <cstring>

#include "machine.h"

extern "C" void fc_kernel_entry(const void* params);

namespace fc_host {

int current_thread;
int current_block;
int num_blocks;
Machine machine;

// splitmix64 (Steele, Lea and Flood 2014).
uint64_t next_random() {
  uint64_t z = (machine.random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void set_runnable(int thread) {
  Warp& warp = machine.warps[size_t(thread / WARP_SIZE)];
  warp.runnable |= 1u << (thread % WARP_SIZE);
  warp.polling &= ~(1u << (thread % WARP_SIZE));
  machine.runnable_warps |= 1u << (thread / WARP_SIZE);
  machine.threads[size_t(thread)].state = ThreadState::runnable;
}

void set_waiting(int thread, ThreadState state) {
  Warp& warp = machine.warps[size_t(thread / WARP_SIZE)];
  warp.runnable &= ~(1u << (thread % WARP_SIZE));
  const bool polls = state == ThreadState::at_mbarrier || state == ThreadState::at_counter;
  if (polls) warp.polling |= 1u << (thread % WARP_SIZE);
  if (warp.runnable == 0) machine.runnable_warps &= ~(1u << (thread / WARP_SIZE));
  machine.threads[size_t(thread)].state = state;
}

// A random set bit, found by rotating.
static int pick_bit(uint32_t bits, uint32_t random) {
  const int shift = int(random & 31);
  const uint32_t rotated = shift ? (bits >> shift) | (bits << (32 - shift)) : bits;
  return (__builtin_ctz(rotated) + shift) & 31;
}

[[noreturn]] static void deadlock() {
  Machine& m = machine;
  describe_warps(m.report->details, sizeof m.report->details);
  if (!m.waits.empty()) {
    const CounterWait& wait = m.waits.front();
    current_thread = wait.thread;
    raise_alarm({"deadlock", m.threads[size_t(wait.thread)].site},
                "waits for a counter to be %d; it is %d, and no block that runs goes on",
                wait.value, *wait.place);
  }
  // One that waits for bytes which nobody sends stands for all, else the first that waits.
  int t = 0;
  while (m.threads[size_t(t)].state == ThreadState::exited) ++t;
  for (int other = t; other < m.num_threads; ++other) {
    const Thread& thread = m.threads[size_t(other)];
    if (thread.state != ThreadState::at_mbarrier) continue;
    const MBarrier& bar = m.sm90.mbarriers[size_t(thread.mbarrier)];
    if (bar.pending == 0 && bar.tx > bar.bytes_under_way) {
      t = other;
      break;
    }
  }
  current_thread = t;
  const Thread& thread = m.threads[size_t(t)];
  if (thread.state == ThreadState::at_mbarrier) {
    const MBarrier& bar = m.sm90.mbarriers[size_t(thread.mbarrier)];
    char text[256];
    mbarrier_describe(bar, text, sizeof text);
    raise_alarm({"deadlock", thread.site, bar.ref.name, bar.ref.index},
                "waits for a phase of an mbarrier that never completes: %s", text);
  }
  if (thread.state == ThreadState::at_warp_op) {
    const Warp& warp = m.warps[size_t(t / WARP_SIZE)];
    if (warp.arrived == 0xffffffffu && (thread.op == WarpOp::named_barrier_sync ||
                                        thread.op == WarpOp::named_barrier_any)) {
      const NamedBarrier& bar = m.sm90.named[warp.uniform >> 32];
      raise_alarm({"deadlock", thread.site},
                  "waits at named barrier %d: %d of %d threads have come, the others never do",
                  int(warp.uniform >> 32), bar.arrived, bar.threads);
    }
    if (warp.arrived == 0xffffffffu) {
      raise_alarm({"deadlock", thread.site},
                  "waits for products that some warp of its warpgroup never issues");
    }
    raise_alarm({"deadlock", thread.site}, "%d of 32 lanes wait in %s; the others never arrive",
                __builtin_popcount(warp.arrived), op_name(thread.op));
  }
  raise_alarm({"deadlock", thread.site},
              "%d of %d threads wait in block_sync; the others never arrive",
              m.num_at_block_barrier, m.num_threads);
}

// Asynchronous units go on: now and then, or until some thread can when none can.
static void perform_asynchronous() {
  Machine& m = machine;
  if (int(next_random() & 255) < m.sm90.eagerness) {
    tma_perform_some();
    wgmma_perform_some();
  }
  while (m.runnable_warps == 0 && tma_perform_load()) {
  }
}

// Other blocks run until this one's turn comes again.
static void halt() {
  Machine& m = machine;
  m.has_halted = true;
  m.thread = current_thread;
  fiber_switch(m.threads[size_t(current_thread)].fiber, m.main_fiber);
  if (m.is_stuck) deadlock();
}

// Goes on with a runnable thread; returns when the caller's turn comes again.
void schedule(int caller) {
  Machine& m = machine;
  if (m.is_sm90) perform_asynchronous();
  if (!m.waits.empty()) wake_at_counters();
  while (m.runnable_warps == 0 && !m.waits.empty()) {
    halt();
    wake_at_counters();
  }
  if (m.runnable_warps == 0) {
    if (m.num_exited < m.num_threads) deadlock();
    Fiber finished;
    fiber_switch(finished, m.main_fiber);
  }
  const uint64_t random = next_random();
  if (m.num_pending_copies > 0 && (random >> 60) == 0) async_perform_some();
  int w = caller / WARP_SIZE;
  if (m.warps[size_t(w)].runnable == 0 || int((random >> 32) & 255) >= m.stay_in_warp) {
    w = pick_bit(m.runnable_warps, uint32_t(random >> 8));
  }
  const int next = w * WARP_SIZE + pick_bit(m.warps[size_t(w)].runnable, uint32_t(random));
  if (next == caller) return;
  ++m.report->switches;
  current_thread = next;
  fiber_switch(m.threads[size_t(caller)].fiber, m.threads[size_t(next)].fiber);
}

// At moments where a thread need not wait, it may still lose its turn.
void maybe_reschedule() {
  if ((next_random() & 7) == 0) schedule(current_thread);
}

// `what` is where the current thread is; the other thread of its warp waits elsewhere or has left.
[[noreturn]] void diverged(Site site, const char* what, int other_thread) {
  const Thread& other = machine.threads[size_t(other_thread)];
  const char* elsewhere = other.state == ThreadState::exited             ? "has left the kernel"
                          : other.state == ThreadState::at_block_barrier ? "is in block_sync"
                                                                         : "is in another one";
  if (other.state != ThreadState::exited) set_other_thread(current_block, other_thread, other.site);
  describe_warps(machine.report->details, sizeof machine.report->details);
  raise_alarm({"divergence", site},
              "a lane is in %s while a lane of its warp %s: all 32 lanes must meet in the same "
              "operation, on the same line, with the same arguments",
              what, elsewhere);
}

static void fiber_entry() {
  fc_kernel_entry(machine.launch.params);
  async_check_exit();
  const int t = current_thread;
  if (machine.is_sm90) {
    tma_check_thread_exit(t);
    wgmma_check_exit(t / WARP_SIZE);
  }
  Warp& warp = machine.warps[size_t(t / WARP_SIZE)];
  ++machine.num_exited;
  set_waiting(t, ThreadState::exited);
  if (warp.arrived != 0) {
    current_thread = warp.first_lane + __builtin_ctz(warp.arrived);
    diverged(warp.site, op_name(warp.op), t);
  }
  schedule(t);
  __builtin_unreachable();
}

// --- meetings of a warp --------------------------------------------------------------------------

// Lanes of one warp may not wait in different places.
static void check_converged(WarpOp op, uint64_t uniform, Site site) {
  const int t = current_thread;
  const Warp& warp = machine.warps[size_t(t / WARP_SIZE)];
  if (warp.arrived != 0 &&
      (warp.op != op || warp.uniform != uniform || !same_site(warp.site, site))) {
    diverged(site, op_name(op), warp.first_lane + __builtin_ctz(warp.arrived));
  }
  // A lane that polls an mbarrier or a counter will still come.
  const uint32_t elsewhere = ~warp.runnable & ~warp.arrived & ~warp.polling;
  if (elsewhere != 0) diverged(site, op_name(op), warp.first_lane + __builtin_ctz(elsewhere));
}

bool warp_arrive(WarpOp op, void* argument, uint64_t uniform, Site site) {
  const int t = current_thread;
  Warp& warp = machine.warps[size_t(t / WARP_SIZE)];
  if (warp.arrived == 0) {
    warp.op = op;
    warp.uniform = uniform;
    warp.site = site;
  }
  Thread& thread = machine.threads[size_t(t)];
  thread.op = op;
  thread.site = site;
  check_converged(op, uniform, site);
  warp.argument[t % WARP_SIZE] = argument;
  warp.arrived |= 1u << (t % WARP_SIZE);
  if (warp.arrived == 0xffffffffu) {
    ++machine.report->warp_ops;
    return true;
  }
  set_waiting(t, ThreadState::at_warp_op);
  schedule(t);
  return false;
}

void* warp_argument(int lane) {
  return machine.warps[size_t(current_thread / WARP_SIZE)].argument[lane];
}

bool warp_vote() {
  bool any = false;
  for (int lane = 0; lane < WARP_SIZE; ++lane) any |= *static_cast<bool*>(warp_argument(lane));
  return any;
}

void warp_release() {
  Warp& warp = machine.warps[size_t(current_thread / WARP_SIZE)];
  warp.arrived = 0;
  for (int l = 0; l < WARP_SIZE; ++l) {
    machine.threads[size_t(warp.first_lane + l)].state = ThreadState::runnable;
  }
  warp.runnable = 0xffffffffu;
  machine.runnable_warps |= 1u << (current_thread / WARP_SIZE);
  maybe_reschedule();
}

void hold_warp() {
  const int t = current_thread;
  Warp& warp = machine.warps[size_t(t / WARP_SIZE)];
  warp.holder = t;
  set_waiting(t, ThreadState::at_warp_op);
  schedule(t);
}

void wake_warp(int w) { set_runnable(machine.warps[size_t(w)].holder); }

void warp_barrier(Site site) {
  if (!warp_arrive(WarpOp::warp_sync, nullptr, 0, site)) return;
  ++machine.report->barriers;
  clocks_join_warp(current_thread / WARP_SIZE);
  warp_release();
}

// --- the barrier of the block --------------------------------------------------------------------

void block_barrier(Site site) {
  Machine& m = machine;
  const int t = current_thread;
  Thread& thread = m.threads[size_t(t)];
  thread.site = site;
  Warp& warp = m.warps[size_t(t / WARP_SIZE)];
  if (warp.arrived != 0) {
    diverged(site, "block_sync", warp.first_lane + __builtin_ctz(warp.arrived));
  }
  if (m.num_at_block_barrier == 0) {
    m.block_barrier_site = site;
    m.block_barrier_thread = t;
  } else if (!same_site(m.block_barrier_site, site)) {
    set_other_thread(current_block, m.block_barrier_thread, m.block_barrier_site);
    describe_warps(m.report->details, sizeof m.report->details);
    raise_alarm(
        {"divergence", site},
        "threads of one block wait in block_sync on different lines: the barrier would pair "
        "unrelated phases");
  }
  ++m.num_at_block_barrier;
  if (m.num_at_block_barrier < m.num_threads) {
    set_waiting(t, ThreadState::at_block_barrier);
    schedule(t);
    return;
  }
  ++m.report->barriers;
  m.num_at_block_barrier = 0;
  clocks_join_block();
  for (int other = 0; other < m.num_threads; ++other) set_runnable(other);
  maybe_reschedule();
}

// --- a block -------------------------------------------------------------------------------------

void begin_block(int block) {
  Machine& m = machine;
  current_block = m.number = block;
  m.waits.clear();
  m.is_stuck = false;
  m.num_exited = m.num_at_block_barrier = m.num_pending_copies = 0;
  m.runnable_warps = 0;
  // Blocks differ in how their warps interleave: from lock step to one warp running far ahead.
  constexpr int STAY[4] = {256, 250, 192, 0};
  m.stay_in_warp = STAY[next_random() & 3];
  clocks_reset();
  shadow_reset();
  between_blocks_reset();
  for (int w = 0; w < m.num_warps; ++w) {
    Warp& warp = m.warps[size_t(w)];
    warp.arrived = warp.runnable = warp.polling = 0;
    warp.first_lane = w * WARP_SIZE;
  }
  if (m.is_sm90) {
    // From units that finish at once to units that finish when nothing else can happen.
    constexpr int EAGERNESS[4] = {256, 64, 8, 0};
    m.sm90.eagerness = EAGERNESS[next_random() & 3];
    mbarriers_reset();
    tma_reset();
    warpgroups_reset();
    wgmma_reset();
  }
  for (int t = 0; t < m.num_threads; ++t) {
    Thread& thread = m.threads[size_t(t)];
    thread.open_group = 0;
    thread.site = {"", 0};
    thread.copies.clear();
    thread.access = m.launch.starts_early ? Access::none : Access::all;
    thread.store_slot = -1;
    thread.empty_groups = 0;
    set_runnable(t);
    // Stacks start at different offsets within a page, or they would all share a few cache sets.
    const auto shift = size_t(t % 61) * 64;
    fiber_prepare(thread.fiber, (*m.stacks)[t], FIBER_STACK_BYTES - shift, fiber_entry);
  }
  m.thread = int(next_random() % uint64_t(m.num_threads));
}

void run_block() {
  Machine& m = machine;
  m.has_halted = false;
  current_block = m.number;
  current_thread = m.thread;
  fiber_switch(m.main_fiber, m.threads[size_t(current_thread)].fiber);
  if (m.has_halted) return;
  if (!m.stopped && m.is_sm90) {
    tma_check_block_end();
    if (!m.stopped) warpgroups_check_block_end();
  }
  if (!m.stopped) raise_deferred();
}

void let_blocks_run() {
  Machine& m = machine;
  if (m.num_others == 0 || (next_random() & 1) == 0) return;
  halt();
}

}  // namespace fc_host
