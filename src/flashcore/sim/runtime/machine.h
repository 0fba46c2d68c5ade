// machine.h - the state of one simulated run. Parts: scheduler.cpp (fibers, meetings, barriers),
// clocks.cpp (who has seen what), shadow.cpp (shared memory), global.cpp (tensors),
// between_blocks.cpp (what blocks know of each other), async.cpp (cp.async), alarm.cpp (reports);
// for Hopper those in hopper/.
//
// Order of events. An agent is whoever accesses memory: a thread, or a warp as a whole (wmma loads
// read on behalf of 32 lanes). Each agent has a clock; an event's epoch is (agent, clock). A
// thread's vector clock says, per agent, up to which clock it has seen that agent's events: an
// earlier event is ordered before the thread's next one iff its clock is at most that (Lamport
// 1978; epochs as in FastTrack, Flanagan and Freund 2009). Only barriers let a thread learn of
// others.
//
// Asynchronous units are agents too, with clocks of their own (struct Agents): what a thread has
// seen of an mbarrier is the number of its phases, of a warp's products those that it waited for.
// The clock of the kind `fenced` says up to where a thread's writes are visible to those units: it
// is never beyond what is known of the thread, and a fence by anybody brings it up to that.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "abi.h"
#include "fiber.h"
#include "host/simulator/machine.cuh"
#include "hopper/sm90.h"

namespace fc_host {

constexpr int WARP_SIZE = 32;
constexpr uint8_t POISON_BYTES[2] = {0xa5, 0x7f};  // NaN in float32, float16 and bfloat16

// --- epochs --------------------------------------------------------------------------------------

using Epoch = uint32_t;  // agent in bits 0..10, clock in bits 11..29, a flag in bits 30 and 31
constexpr int AGENT_BITS = 11;
constexpr Epoch FLAG_ATOMIC = 1u << 30;   // of a write: by an atomic
constexpr Epoch FLAG_PENDING = 1u << 31;  // of a write: an async copy that was not waited for
constexpr Epoch FLAG_SET = 1u << 31;      // of a read: index of a ReadSet
constexpr int MAX_CLOCK = (1 << 19) - 1;

inline Epoch make_epoch(int agent, int clock) {
  return (uint32_t(clock) << AGENT_BITS) | uint32_t(agent);
}
inline int agent_of(Epoch epoch) { return int(epoch & ((1u << AGENT_BITS) - 1)); }
inline int clock_of(Epoch epoch) { return int((epoch >> AGENT_BITS) & MAX_CLOCK); }

// --- shared memory -------------------------------------------------------------------------------

using PackedSite = uint32_t;  // index into Machine::files in the upper 8 bits, line in the lower 24

constexpr int CELL_BYTES = 2;  // the smallest element

struct Cell {
  Epoch write;  // last write, 0: never written
  Epoch read;   // last read since then, or FLAG_SET | index when several are unordered
  PackedSite write_site;
  PackedSite read_site;
};

struct Read {
  Epoch epoch;
  PackedSite site;
};

struct ReadSet {
  std::vector<Read> reads;
};

// --- threads -------------------------------------------------------------------------------------

enum class ThreadState : uint8_t {
  runnable,
  at_warp_op,
  at_block_barrier,
  at_mbarrier,
  at_counter,
  exited
};

struct AsyncCopy {
  int group;
  SmemRef dst;
  int dst_offset;
  int bytes;
  const uint8_t* src;  // null: zero-fill
  bool performed;
  PackedSite site;
};

// What a thread may touch of global memory: of the kernels before this one it knows nothing; that
// they have ended but for the last one, whose results are `late`; or that those are there, too.
enum class Access { none, all_but_late, all };

struct Thread {
  Fiber fiber;
  ThreadState state;
  WarpOp op;
  Site site;
  int open_group;                 // number of cp.async groups committed so far
  std::vector<AsyncCopy> copies;  // not waited for yet, in order of issue
  int mbarrier;                   // that it waits at
  Access access;
  int store_slot;                 // of its bulk stores, or -1
  int empty_groups;               // of bulk stores, committed before the first store
};

struct Warp {
  uint32_t runnable;
  uint32_t arrived;
  uint32_t polling;  // lanes at an mbarrier or a counter
  WarpOp op;
  uint64_t uniform;
  Site site;
  int first_lane;
  void* argument[WARP_SIZE];
  int elected;  // lane
  int holder;   // thread that hold_warp() suspends
  WarpSm90 sm90;

  // The warp as an agent: its clock counts snapshots of its lanes' clocks. Seeing snapshot s of the
  // warp means having seen every lane's clock in it.
  bool snapshot_is_stale;
  std::vector<int32_t> snapshots;    // WARP_SIZE clocks each
  std::vector<int32_t> seen_by_all;  // vector clock: what every lane has seen
};

// --- blocks --------------------------------------------------------------------------------------

using Clocks = std::vector<int32_t>;                 // of the threads of a block
using Blocks = std::vector<std::pair<int, Clocks>>;  // block and what is known of it

// A thread that has seen `epoch` of this block knows `known` of others; TMA too, if it is `fenced`.
struct Acquisition {
  Epoch epoch;
  Blocks known;
  bool fenced = false;
};

// A thread that waits until a counter has a value.
struct CounterWait {
  int thread;
  const int32_t* place;
  int value;
};

// The state of a block that has begun. While it polls a counter, or waits at one, others may run
// (runtime.cpp).
struct Block {
  int number = 0;
  int thread = 0;  // that runs on where the block has halted
  bool has_halted = false;
  bool is_stuck = false;  // no block can go on, says who finds out
  std::vector<CounterWait> waits;
  std::unique_ptr<FiberStacks> stacks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int stay_in_warp = 0;  // of 256: how often the scheduler goes on within the same warp
  uint32_t runnable_warps = 0;
  int num_exited = 0, num_at_block_barrier = 0;
  Site block_barrier_site = {"", 0};
  int block_barrier_thread = 0;

  std::vector<int32_t> clocks;  // vector clocks: num_threads rows of num_agents
  std::vector<int32_t> joined;
  std::vector<Acquisition> acquisitions;

  std::vector<uint8_t> smem_storage;
  uint8_t* smem = nullptr;
  std::vector<Cell> cells;
  std::vector<ReadSet> read_sets;
  std::vector<uint32_t> free_read_sets;
  int num_pending_copies = 0;
  Sm90 sm90 = {};
};

// --- everything ----------------------------------------------------------------------------------

struct Machine : Block {  // the one that runs
  FcLaunch launch;
  FcReport* report;
  FcReport deferred;  // kind is empty: none
  int num_threads, num_warps, num_agents;
  bool is_sm90;
  Agents agents;

  uint64_t random_state;
  bool stopped;
  int num_others;  // blocks that have not ended, besides the one that runs
  int room;        // where blocks wait for each other, for so many at a time; else 0

  Fiber main_fiber;
  std::vector<const char*> files;
  const char* last_file;
  uint32_t last_file_index;
};

extern Machine machine;

inline int32_t* clock_row(int thread) {
  return machine.clocks.data() + size_t(thread) * size_t(machine.num_agents);
}
inline int warp_agent(int warp) { return machine.num_threads + warp; }
inline Epoch thread_epoch(int thread) { return make_epoch(thread, clock_row(thread)[thread]); }

// scheduler.cpp
uint64_t next_random();
void begin_block(int block);
void run_block();  // until it ends or halts
void maybe_reschedule();
void set_runnable(int thread);
void set_waiting(int thread, ThreadState state);
void schedule(int caller);
[[noreturn]] void diverged(Site site, const char* what, int other_thread);
// Of the last lane that arrived: keeps its warp in the meeting until someone wakes this lane.
void hold_warp();
void wake_warp(int warp);
// clocks.cpp
void clocks_reset();
void clocks_tick(int thread);
void clocks_release(int thread, std::vector<int32_t>& into);
void clocks_acquire(int thread, const std::vector<int32_t>& from);
void clocks_derive(int32_t* clock);
void clocks_join_warp(int warp);
void clocks_join_block();
Epoch warp_snapshot(int warp);
// shadow.cpp
void shadow_reset();
int shadow_locate(const SmemRef& ref, int bytes, int alignment, bool by_warp, Site site);
void shadow_begin_async(const SmemRef& ref, int offset, int bytes, Site site);
void shadow_end_async(const AsyncCopy& copy);
bool ordered(Epoch epoch, const int32_t* clock);
// An access of an asynchronous unit with epoch `me`, for a thread that has seen `clock`.
void shadow_write_by_unit(const SmemRef& ref, int offset, int bytes, Epoch me, const int32_t* clock,
                          Site site);
void shadow_check_unit_read(const SmemRef& ref, int cell, const int32_t* clock, const char* doing,
                            Site site, bool by_warp);
void shadow_mark_unit_read(Cell& cell, Epoch me, PackedSite site);
void shadow_read_by_unit(const SmemRef& ref, int offset, int bytes, Epoch me, const int32_t* clock,
                         Site site);
void* smem_write_as(int thread, SmemRef ref, int bytes, int alignment, Site site);
// global.cpp
const uint8_t* global_source(uint64_t address, int bytes, int alignment, Site site);
uint8_t* global_claim_row(uint64_t address, int bytes, Site site);
uint8_t* global_sums(uint64_t address, int bytes, bool replaces, Site site);
void global_sums_complete(const uint8_t* place, int bytes);
// between_blocks.cpp
void between_blocks_start();
void between_blocks_reset();
// Returns whether the current thread, or TMA on its behalf, knows what a thread did up to that
// thread's clock.
bool known_of_block(int block, int thread, int clock, bool by_tma = false);
// Threads whose counter has the value that they wait for can go on.
void wake_at_counters();
// async.cpp
void async_perform(AsyncCopy& copy);
void async_perform_some();
void async_check_exit();

// alarm.cpp
bool same_site(const Site& one, const Site& other);  // in file and line
PackedSite pack_site(Site site);
Site unpack_site(PackedSite site);
struct Alarm {
  const char* kind;
  Site site;
  const char* array = "";
  int64_t element = -1;
  int tensor = -1;
  bool by_warp = false;
};
[[noreturn]] void raise_alarm(const Alarm& alarm, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
// Raises the alarm at the end of the block, or in place of another one that is not a race.
void defer_alarm(const Alarm& alarm, const char* message);
bool raise_deferred();
void set_other_agent(int agent, Site site);
void set_other_thread(int block, int thread, Site site);
void describe_warps(char* text, size_t bytes);
const char* op_name(WarpOp op);

}  // namespace fc_host
