// shadow.cpp - what is known of every 2 bytes of shared memory: who wrote and who read them last.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace fc_host {

void shadow_reset() {
  Machine& m = machine;
  std::fill(m.cells.begin(), m.cells.end(), Cell{});
  m.free_read_sets.clear();
  for (uint32_t i = 0; i < m.read_sets.size(); ++i) m.free_read_sets.push_back(i);
  for (size_t i = 0; i < m.cells.size() * CELL_BYTES; ++i) m.smem[i] = POISON_BYTES[i % 2];
}

bool ordered(Epoch epoch, const int32_t* clock) {
  return clock_of(epoch) <= clock[agent_of(epoch)];
}

// --- alarms --------------------------------------------------------------------------------------

static int64_t element_at(const SmemRef& ref, int cell) {
  return (int64_t(cell) * CELL_BYTES - ref.base) / ref.element_bytes;
}

// Returns in words what the agent of an earlier write was doing.
static const char* earlier_write(Epoch epoch) {
  if (epoch & FLAG_ATOMIC) return "another adds by an atomic";
  if (!machine.is_sm90 || agent_of(epoch) < machine.agents.mbarriers) return "another writes";
  const bool is_barrier = agent_of(epoch) == machine.agents.barrier_cells;
  return is_barrier ? "holds an mbarrier" : "a TMA load writes";
}

static const char* earlier_read(Epoch epoch) {
  if (!machine.is_sm90 || agent_of(epoch) < machine.agents.groups) return "another reads";
  return agent_of(epoch) < machine.agents.mbarriers ? "a wgmma reads" : "a TMA store reads";
}

[[noreturn]] static void race(const SmemRef& ref, int cell, const char* doing, const char* earlier,
                              Epoch epoch, PackedSite earlier_site, Site site, bool by_warp) {
  set_other_agent(agent_of(epoch), unpack_site(earlier_site));
  raise_alarm({"race", site, ref.name, element_at(ref, cell), -1, by_warp},
              "data race on shared memory: %s %s, and no barrier orders the two", doing, earlier);
}

[[noreturn]] static void touched_pending(const SmemRef& ref, int cell, const char* doing, Site site,
                                         bool by_warp) {
  const Cell& c = machine.cells[size_t(cell)];
  set_other_agent(agent_of(c.write), unpack_site(c.write_site));
  raise_alarm({"async-pending", site, ref.name, element_at(ref, cell), -1, by_warp},
              "%s the destination of a cp.async that its thread has not waited for", doing);
}

// A read of what nothing has written yet. If another agent writes it later in the block without a
// barrier in between, that is a race, which says more; so this alarm waits for the block's end.
static void unwritten(const SmemRef& ref, int cell, Site site, bool by_warp) {
  defer_alarm({"uninitialized-read", site, ref.name, element_at(ref, cell), -1, by_warp},
              "reads shared memory that nothing has written in this block");
}

// --- bounds --------------------------------------------------------------------------------------

void check_view(const char* name, int64_t byte_offset, int64_t count, int element_bytes,
                Site site) {
  const int64_t end = byte_offset + count * element_bytes;
  if (byte_offset < 0 || count < 0 || end > machine.launch.smem_bytes) {
    raise_alarm({"out-of-bounds", site, name, 0},
                "the view covers bytes %lld to %lld of shared memory; the block has %d",
                static_cast<long long>(byte_offset), static_cast<long long>(end),
                machine.launch.smem_bytes);
  }
  if (byte_offset % element_bytes != 0 || byte_offset % CELL_BYTES != 0) {
    raise_alarm({"misaligned", site, name, 0}, "the view starts at byte %lld, elements have %d",
                static_cast<long long>(byte_offset), element_bytes);
  }
}

void check_alignment(SmemRef ref, int alignment, const char* what, Site site) {
  const int64_t offset = ref.base + int64_t(ref.index) * ref.element_bytes;
  if (offset % alignment != 0) {
    raise_alarm({"misaligned", site, ref.name, ref.index},
                "%s at byte %lld of shared memory, which is not a multiple of %d", what,
                static_cast<long long>(offset), alignment);
  }
}

// Byte offset in shared memory of a checked access.
int shadow_locate(const SmemRef& ref, int bytes, int alignment, bool by_warp, Site site) {
  const int64_t last = int64_t(ref.index) + std::max(bytes / ref.element_bytes, 1) - 1;
  if (ref.index < 0 || last >= ref.count) {
    raise_alarm({"out-of-bounds", site, ref.name, ref.index < 0 ? ref.index : last, -1, by_warp},
                "accesses elements %d to %lld of an array of %d in shared memory", ref.index,
                static_cast<long long>(last), ref.count);
  }
  const int offset = ref.base + ref.index * ref.element_bytes;
  if (offset % alignment != 0) check_alignment(ref, alignment, "an access", site);
  return offset;
}

// --- reads ---------------------------------------------------------------------------------------

static uint32_t take_read_set() {
  Machine& m = machine;
  if (m.free_read_sets.empty()) {
    m.read_sets.emplace_back();
    return uint32_t(m.read_sets.size() - 1);
  }
  const uint32_t index = m.free_read_sets.back();
  m.free_read_sets.pop_back();
  m.read_sets[index].reads.clear();
  return index;
}

// Adds a read to a cell whose last reads are not ordered before it.
static void add_read(Cell& cell, Epoch me, PackedSite site, const int32_t* clock) {
  Machine& m = machine;
  if (!(cell.read & FLAG_SET)) {
    const uint32_t index = take_read_set();
    m.read_sets[index].reads.push_back({cell.read, cell.read_site});
    cell.read = FLAG_SET | index;
  }
  auto& reads = m.read_sets[cell.read & ~FLAG_SET].reads;
  size_t kept = 0;
  for (size_t i = 0; i < reads.size(); ++i) {
    if (reads[i].epoch == me) return;
    if (!ordered(reads[i].epoch, clock)) reads[kept++] = reads[i];
  }
  reads.resize(kept);
  reads.push_back({me, site});
}

// Reads by an agent with epoch `me` that has seen `clock`.
static void read_cells(const SmemRef& ref, int offset, int bytes, Epoch me, const int32_t* clock,
                       Site site, bool by_warp) {
  const PackedSite packed = pack_site(site);
  Cell* cells = machine.cells.data();
  const int end = (offset + bytes) / CELL_BYTES;
  for (int i = offset / CELL_BYTES; i < end; ++i) {
    Cell& cell = cells[i];
    if (cell.write == 0) unwritten(ref, i, site, by_warp);
    if (!ordered(cell.write, clock)) {
      race(ref, i, "reads what", earlier_write(cell.write), cell.write, cell.write_site, site,
           by_warp);
    }
    if (cell.write & FLAG_PENDING) touched_pending(ref, i, "reads", site, by_warp);
    if (cell.read == me) continue;
    if (cell.read == 0 || (!(cell.read & FLAG_SET) && ordered(cell.read, clock))) {
      cell.read = me;
      cell.read_site = packed;
    } else {
      add_read(cell, me, packed, clock);
    }
  }
}

const void* smem_read(SmemRef ref, int bytes, Site site) {
  ++machine.report->smem_accesses;
  const int offset = shadow_locate(ref, bytes, bytes, false, site);
  const int t = current_thread;
  read_cells(ref, offset, bytes, thread_epoch(t), clock_row(t), site, false);
  return machine.smem + offset;
}

const void* smem_read_warp(SmemRef ref, int bytes, Site site) {
  ++machine.report->smem_accesses;
  // A line of a fragment may start at any multiple of 16 bytes.
  const int offset = shadow_locate(ref, bytes, 16, true, site);
  const int w = current_thread / WARP_SIZE;
  const Epoch me = warp_snapshot(w);
  read_cells(ref, offset, bytes, me, machine.warps[size_t(w)].seen_by_all.data(), site, true);
  return machine.smem + offset;
}

// --- writes --------------------------------------------------------------------------------------

static void check_reads_ordered(const SmemRef& ref, int i, const int32_t* clock, const char* doing,
                                Site site) {
  Cell& cell = machine.cells[size_t(i)];
  if (cell.read == 0) return;
  if (!(cell.read & FLAG_SET)) {
    if (!ordered(cell.read, clock)) {
      race(ref, i, doing, earlier_read(cell.read), cell.read, cell.read_site, site, false);
    }
  } else {
    const uint32_t index = cell.read & ~FLAG_SET;
    for (const Read& read : machine.read_sets[index].reads) {
      if (!ordered(read.epoch, clock)) {
        race(ref, i, doing, earlier_read(read.epoch), read.epoch, read.site, site, false);
      }
    }
    machine.free_read_sets.push_back(index);
  }
  cell.read = 0;
}

static void write_cells(const SmemRef& ref, int offset, int bytes, Epoch me, const int32_t* clock,
                        const char* doing, Site site) {
  const PackedSite packed = pack_site(site);
  const int end = (offset + bytes) / CELL_BYTES;
  for (int i = offset / CELL_BYTES; i < end; ++i) {
    Cell& cell = machine.cells[size_t(i)];
    if (!ordered(cell.write, clock)) {
      race(ref, i, doing, earlier_write(cell.write), cell.write, cell.write_site, site, false);
    }
    if (cell.write & FLAG_PENDING) touched_pending(ref, i, doing, site, false);
    check_reads_ordered(ref, i, clock, doing, site);
    cell.write = me;
    cell.write_site = packed;
  }
}

void* smem_write_as(int thread, SmemRef ref, int bytes, int alignment, Site site) {
  ++machine.report->smem_accesses;
  const int offset = shadow_locate(ref, bytes, alignment, false, site);
  write_cells(ref, offset, bytes, thread_epoch(thread), clock_row(thread), "writes what", site);
  return machine.smem + offset;
}

void* smem_write(SmemRef ref, int bytes, Site site) {
  return smem_write_as(current_thread, ref, bytes, bytes, site);
}

// Atomics do not race with each other, but floats added in no fixed order give results that differ
// from run to run.
void* smem_atomic(SmemRef ref, int bytes, Site site) {
  ++machine.report->smem_accesses;
  const int offset = shadow_locate(ref, bytes, bytes, false, site);
  const int32_t* clock = clock_row(current_thread);
  for (int i = offset / CELL_BYTES; i < (offset + bytes) / CELL_BYTES; ++i) {
    const Cell& cell = machine.cells[size_t(i)];
    if (cell.write == 0) unwritten(ref, i, site, false);
    if ((cell.write & FLAG_ATOMIC) && !ordered(cell.write, clock)) {
      set_other_agent(agent_of(cell.write), unpack_site(cell.write_site));
      raise_alarm({"atomic-order", site, ref.name, element_at(ref, i)},
                  "two agents add to one float by atomics that no barrier orders: the sum depends "
                  "on which comes first");
    }
  }
  write_cells(ref, offset, bytes, thread_epoch(current_thread) | FLAG_ATOMIC, clock,
              "adds by an atomic to what", site);
  return machine.smem + offset;
}

// --- asynchronous copies -------------------------------------------------------------------------

void shadow_begin_async(const SmemRef& ref, int offset, int bytes, Site site) {
  write_cells(ref, offset, bytes, thread_epoch(current_thread) | FLAG_PENDING,
              clock_row(current_thread), "copies by cp.async over what", site);
  for (int i = 0; i < bytes; ++i) machine.smem[offset + i] = POISON_BYTES[i % 2];
}

// The waiting thread now sees the copy as its own write.
void shadow_end_async(const AsyncCopy& copy) {
  const Epoch me = thread_epoch(current_thread);
  for (int i = copy.dst_offset / CELL_BYTES; i < (copy.dst_offset + copy.bytes) / CELL_BYTES; ++i) {
    machine.cells[size_t(i)].write = me;
  }
}

// --- asynchronous units: TMA and WGMMA -----------------------------------------------------------

// A thread's write reaches a unit only through a fence between the two proxies, by that thread or
// by one that knows of the write, on the way by which whoever asks the unit knows of it.
static void check_fenced(const SmemRef& ref, int i, const int32_t* clock, const char* doing,
                         Site site) {
  const Cell& cell = machine.cells[size_t(i)];
  const int writer = agent_of(cell.write);
  if (cell.write == 0 || writer >= machine.num_threads) return;
  if (clock[machine.agents.fenced + writer] >= clock_of(cell.write)) return;
  set_other_agent(writer, unpack_site(cell.write_site));
  raise_alarm({"missing-fence", site, ref.name, element_at(ref, i)},
              "%s what a thread wrote, and no fence_proxy_async() stands between the two", doing);
}

void shadow_write_by_unit(const SmemRef& ref, int offset, int bytes, Epoch me, const int32_t* clock,
                          Site site) {
  Cell* cells = machine.cells.data();
  const int end = (offset + bytes) / CELL_BYTES;
  Epoch passed = 0;  // nearly always the same for a whole box
  for (int i = offset / CELL_BYTES; i < end; ++i) {
    if (cells[i].write == passed || !ordered(cells[i].write, clock)) continue;
    passed = cells[i].write;
    check_fenced(ref, i, clock, "a TMA load writes over", site);
  }
  write_cells(ref, offset, bytes, me, clock, "a TMA load writes what", site);
  for (int i = 0; i < bytes; ++i) machine.smem[offset + i] = POISON_BYTES[i % 2];
}

// Raises an alarm unless a thread that has seen `clock` may have its unit read the cell.
void shadow_check_unit_read(const SmemRef& ref, int i, const int32_t* clock, const char* doing,
                            Site site, bool by_warp) {
  const Cell& cell = machine.cells[size_t(i)];
  if (cell.write == 0) unwritten(ref, i, site, by_warp);
  if (!ordered(cell.write, clock)) {
    char text[64];
    std::snprintf(text, sizeof text, "%s what", doing);
    race(ref, i, text, earlier_write(cell.write), cell.write, cell.write_site, site, by_warp);
  }
  if (cell.write & FLAG_PENDING) touched_pending(ref, i, doing, site, by_warp);
  check_fenced(ref, i, clock, doing, site);
}

// A unit's reads are in order among themselves: the newest stands for all of them.
void shadow_mark_unit_read(Cell& cell, Epoch me, PackedSite site) {
  Machine& m = machine;
  const auto same = [me](Epoch epoch) { return agent_of(epoch) == agent_of(me); };
  if (cell.read == 0 || (!(cell.read & FLAG_SET) && same(cell.read))) {
    cell.read = me;
    cell.read_site = site;
    return;
  }
  if (!(cell.read & FLAG_SET)) {
    const uint32_t index = take_read_set();
    m.read_sets[index].reads.push_back({cell.read, cell.read_site});
    cell.read = FLAG_SET | index;
  }
  auto& reads = m.read_sets[cell.read & ~FLAG_SET].reads;
  for (Read& read : reads) {
    if (same(read.epoch)) {
      read = {me, site};
      return;
    }
  }
  reads.push_back({me, site});
}

void shadow_read_by_unit(const SmemRef& ref, int offset, int bytes, Epoch me, const int32_t* clock,
                         Site site) {
  const PackedSite packed = pack_site(site);
  for (int i = offset / CELL_BYTES; i < (offset + bytes) / CELL_BYTES; ++i) {
    shadow_check_unit_read(ref, i, clock, "a TMA store reads", site, false);
    shadow_mark_unit_read(machine.cells[size_t(i)], me, packed);
  }
}

}  // namespace fc_host
