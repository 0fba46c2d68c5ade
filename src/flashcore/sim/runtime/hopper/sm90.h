// sm90.h - the state of what prims_sm90.cuh adds: mbarriers, TMA, named barriers, WGMMA.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "host/simulator/machine_sm90.cuh"

namespace fc_host {

using Epoch = uint32_t;
using PackedSite = uint32_t;

constexpr int MAX_MBARRIERS = 64;
constexpr int MAX_STORERS = 16;
constexpr int NUM_NAMED_BARRIERS = 16;
constexpr int MAX_TX_BYTES = (1 << 20) - 1;  // PTX ISA: range of the tx-count
constexpr int GROUP_THREADS = 128;
constexpr int GROUP_WARPS = 4;

// First agent of every kind. Threads come first, from 0.
struct Agents {
  int warps;          // one a warp: its wmma loads
  int fenced;         // one a thread: its writes that are fenced for the async proxy
  int products;       // one a warp: products of its warpgroup that it knows to be complete
  int groups;         // one a warpgroup: the least of its four warps'; who reads WGMMA's operands
  int mbarriers;      // one an mbarrier: phases completed; who writes what TMA loads
  int stores;         // one a storing thread: groups that have read their source
  int barrier_cells;  // owns the memory of mbarriers; nobody is ever ordered after it
};

// --- mbarriers and TMA ---------------------------------------------------------------------------

struct MBarrier {
  SmemRef ref;
  int init_thread;
  Epoch init;
  PackedSite init_site;
  int count;
  int pending;            // arrivals missing in this phase
  int tx;                 // bytes announced that have not arrived
  int bytes_under_way;    // of loads issued
  int phase;              // completed so far
  std::vector<int> waiters;
  std::vector<int32_t> collecting;  // what this phase's arrivals release
  std::vector<int32_t> completed;   // what a wait acquires
  int last_issuer;                  // thread of the newest load
  int phase_of_loads;               // that the newest load completes, counted from 1
  int phase_waited_for;             // newest that someone waited for, counted from 1
  SmemRef last_dst;                 // of the newest load
  PackedSite last_site;
};

struct TmaLoad {
  int mbarrier;
  int dst_offset;
  int rows, row_bytes, swizzle_bytes;
  std::vector<const uint8_t*> src;  // one a row; null: zeros
  int valid_bytes;                  // of a row that is not null
  int skipped_bytes;                // zeros before them
};

struct TmaStore {
  int group;
  int src_offset;
  int row_bytes, swizzle_bytes;
  SmemRef src;
  PackedSite site;
  std::vector<uint8_t*> dst;  // one a row; null: clipped
  int valid_bytes;
  bool performed;
  bool adds;      // bulk_add: floats, all in one row
  bool replaces;  // them
};

struct Storer {
  int thread;
  int committed;  // groups
  std::vector<TmaStore> stores;  // not waited for yet
  std::vector<TmaStore> adds;    // of which is known only that they have read their source
};

// --- barriers among warps ------------------------------------------------------------------------

struct NamedBarrier {
  int threads;  // expected
  int arrived;
  uint32_t warps;    // that arrived
  uint32_t waiting;  // that wait
  Site site;         // of the first
  int first_thread;
  Site sync_site;
  int sync_thread;
  std::vector<int32_t> clock;  // what arrivals released
  bool votes;                  // named_barrier_any
  bool any;                    // so far
};

// --- WGMMA ---------------------------------------------------------------------------------------

// A register array that some product has used, and its content at the last fence.
struct KnownRegisters {
  const void* place[32];  // one a lane
  int words;
  bool is_held;                   // accumulators of a pending product
  int fences_at_landing;          // fences passed when its last product was waited for
  std::vector<uint32_t> content;  // of 32 lanes
};

struct WarpSm90 {
  int issued;               // products
  int completed;            // products waited for
  std::vector<int> groups;  // products issued by the end of each committed group
  PackedSite last_issue;
  int fences;
  int fences_at_wait;
  std::vector<KnownRegisters> known;
  bool waits_for_issue;  // in wgmma_wait, for products that other warps have not issued
  bool any;  // what the last vote came to
  int num_set_registers;
  int registers;
  Site registers_site;
};

// The accumulators of a run of products, held by the tensor cores until they are waited for.
struct Chain {
  int frags;
  int products;               // queued that use it
  uint32_t joined;            // warps of the group whose registers are held
  int last[GROUP_WARPS];      // product of each
  float* reg[GROUP_THREADS];
  std::vector<float> accum;  // [64][16 * frags]
};

struct Product {
  WgmmaIssue issue;  // of the first warp; its registers are not used
  int chain;
  uint32_t joined;
  Site site;
  int first_thread;
  const uint32_t* a_place[GROUP_THREADS];
  uint32_t a_reg[GROUP_THREADS][4];
};

struct Warpgroup {
  int first_product;  // number of products.front(), counted from 1
  std::deque<Product> products;
  int ready;      // issued by all four warps
  int performed;
  std::vector<Chain> chains;
};

struct Sm90 {
  std::vector<MBarrier> mbarriers;
  std::vector<int16_t> mbarrier_at;  // by byte offset / 8
  std::vector<TmaLoad> loads;        // under way
  std::vector<Storer> storers;
  int num_pending_stores;
  NamedBarrier named[NUM_NAMED_BARRIERS];
  std::vector<Warpgroup> groups;
  int eagerness;  // of 256: how often the scheduler lets an asynchronous unit go on
};

// mbarrier.cpp
void mbarriers_reset();
int mbarrier_find(const SmemRef& bar, Site site);
void mbarrier_complete_tx(int index, int bytes);
int mbarrier_describe(const MBarrier& bar, char* text, size_t bytes);
// tma.cpp
void tma_reset();
bool tma_perform_load();
void tma_perform_some();
void tma_check_thread_exit(int thread);
void tma_check_block_end();
// warpgroup.cpp
void warpgroups_reset();
void warpgroups_check_block_end();
// wgmma.cpp
void wgmma_reset();
void wgmma_perform_some();
void wgmma_check_exit(int warp);

}  // namespace fc_host
