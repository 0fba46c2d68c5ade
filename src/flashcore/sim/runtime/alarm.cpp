// alarm.cpp - fills the report and abandons the run.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace fc_host {

bool same_site(const Site& one, const Site& other) {
  if (one.line != other.line) return false;
  return one.file == other.file || std::strcmp(one.file, other.file) == 0;
}

PackedSite pack_site(Site site) {
  Machine& m = machine;
  if (site.file != m.last_file) {
    uint32_t index = 0;
    while (index < m.files.size() && std::strcmp(m.files[index], site.file) != 0) ++index;
    if (index == m.files.size() && index < 255) m.files.push_back(site.file);
    m.last_file = site.file;
    m.last_file_index = index;
  }
  return (m.last_file_index << 24) | uint32_t(site.line);
}

Site unpack_site(PackedSite site) {
  const size_t index = site >> 24;
  return {index < machine.files.size() ? machine.files[index] : "?", int(site & 0xffffffu)};
}

const char* op_name(WarpOp op) {
  switch (op) {
    case WarpOp::shfl_xor:
      return "shfl_xor";
    case WarpOp::warp_uniform:
      return "warp_uniform";
    case WarpOp::warp_any:
      return "warp_any";
    case WarpOp::warp_sync:
      return "warp_sync";
    case WarpOp::wmma_load_a:
      return "wmma_load_a";
    case WarpOp::wmma_load_b:
      return "wmma_load_b";
    case WarpOp::wmma_mma:
      return "wmma_mma";
    case WarpOp::named_barrier_sync:
      return "named_barrier_sync";
    case WarpOp::named_barrier_arrive:
      return "named_barrier_arrive";
    case WarpOp::named_barrier_any:
      return "named_barrier_any";
    case WarpOp::set_registers:
      return "raise_registers or lower_registers";
    case WarpOp::elect_lane:
      return "elect_lane";
    case WarpOp::stmatrix:
      return "stmatrix_x4";
    case WarpOp::ldmatrix:
      return "ldmatrix_x4";
    case WarpOp::mma8:
      return "mma8_transposed";
    case WarpOp::movmatrix:
      return "transpose8x8";
    case WarpOp::wgmma:
      return "wgmma";
    case WarpOp::wgmma_fence:
      return "wgmma_fence";
    case WarpOp::wgmma_commit:
      return "wgmma_commit";
    case WarpOp::wgmma_wait:
      return "wgmma_wait";
  }
  return "?";
}

static void fill_agent(FcAgent& agent, int block, int warp, int lane, Site site) {
  agent.block = block;
  agent.warp = warp;
  agent.lane = lane;
  agent.line = site.line;
  std::snprintf(agent.file, sizeof agent.file, "%s", site.file);
}

void set_other_thread(int block, int thread, Site site) {
  fill_agent(machine.report->other, block, thread / WARP_SIZE, thread % WARP_SIZE, site);
  machine.report->has_other = 1;
}

// An asynchronous unit is named by the thread or warp that made it work.
void set_other_agent(int agent, Site site) {
  const Agents& first = machine.agents;
  const Sm90& sm90 = machine.sm90;
  int warp = agent - first.warps;
  if (machine.is_sm90 && agent >= first.groups) {
    if (agent >= first.barrier_cells) {
      agent = 0;
    } else if (agent >= first.stores) {
      agent = sm90.storers[size_t(agent - first.stores)].thread;
    } else if (agent >= first.mbarriers) {
      agent = sm90.mbarriers[size_t(agent - first.mbarriers)].last_issuer;
    } else {
      warp = (agent - first.groups) * GROUP_WARPS;
    }
  }
  if (agent < machine.num_threads) {
    set_other_thread(current_block, agent, site);
  } else {
    fill_agent(machine.report->other, current_block, warp, -1, site);
    machine.report->has_other = 1;
  }
}

static void fill(FcReport& report, const Alarm& alarm, const char* message) {
  std::snprintf(report.kind, sizeof report.kind, "%s", alarm.kind);
  std::snprintf(report.message, sizeof report.message, "%s", message);
  std::snprintf(report.array, sizeof report.array, "%s", alarm.array);
  report.element = alarm.element;
  report.tensor = alarm.tensor;
  fill_agent(report.agent, current_block, current_thread / WARP_SIZE,
             alarm.by_warp ? -1 : current_thread % WARP_SIZE, alarm.site);
}

void defer_alarm(const Alarm& alarm, const char* message) {
  if (machine.deferred.kind[0] == 0) fill(machine.deferred, alarm, message);  // the first counts
}

bool raise_deferred() {
  if (machine.deferred.kind[0] == 0) return false;
  *machine.report = machine.deferred;
  machine.stopped = true;
  return true;
}

static void raise_with(const Alarm& alarm, const char* format, va_list arguments) {
  if (std::strcmp(alarm.kind, "race") != 0 && raise_deferred()) return;
  char message[sizeof FcReport::message];
  std::vsnprintf(message, sizeof message, format, arguments);
  fill(*machine.report, alarm, message);
  machine.stopped = true;
}

// The fibers are abandoned where they stand: kernels own nothing that would have to be released.
[[noreturn]] static void abandon_run() {
  Fiber abandoned;
  fiber_switch(abandoned, machine.main_fiber);
  __builtin_unreachable();
}

void raise_alarm(const Alarm& alarm, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  raise_with(alarm, format, arguments);
  va_end(arguments);
  abandon_run();
}

void misuse(Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  raise_with({"misuse", site}, format, arguments);
  va_end(arguments);
  abandon_run();
}

static int describe_place(char* text, size_t bytes, const Thread& thread) {
  switch (thread.state) {
    case ThreadState::exited:
      return std::snprintf(text, bytes, "left");
    case ThreadState::runnable:
      return std::snprintf(text, bytes, "on the way");
    case ThreadState::at_block_barrier:
      return std::snprintf(text, bytes, "in block_sync at %s:%d", thread.site.file,
                           thread.site.line);
    case ThreadState::at_mbarrier: {
      const int used = std::snprintf(text, bytes, "in mbar_wait at %s:%d: ", thread.site.file,
                                     thread.site.line);
      if (size_t(used) >= bytes) return used;
      return used + mbarrier_describe(machine.sm90.mbarriers[size_t(thread.mbarrier)], text + used,
                                      bytes - size_t(used));
    }
    case ThreadState::at_counter:
      return std::snprintf(text, bytes, "in gmem_await at %s:%d", thread.site.file,
                           thread.site.line);
    case ThreadState::at_warp_op:
      return std::snprintf(text, bytes, "in %s at %s:%d", op_name(thread.op), thread.site.file,
                           thread.site.line);
  }
  return 0;
}

// One line a warp; lanes in the same place are named together.
void describe_warps(char* text, size_t bytes) {
  size_t used = 0;
  const auto add = [&](int written) {
    used = used + size_t(written) < bytes ? used + size_t(written) : bytes - 1;
  };
  for (int w = 0; w < machine.num_warps; ++w) {
    add(std::snprintf(text + used, bytes - used, "warp %d:", w));
    int pending = 0;
    int begin = 0;
    while (begin < WARP_SIZE) {
      const Thread& first = machine.threads[size_t(w * WARP_SIZE + begin)];
      int end = begin;
      for (; end < WARP_SIZE; ++end) {
        const Thread& thread = machine.threads[size_t(w * WARP_SIZE + end)];
        const bool same = thread.state == first.state &&
                          (thread.state == ThreadState::exited ||
                           (same_site(thread.site, first.site) && thread.op == first.op));
        if (!same) break;
        pending += int(thread.copies.size());
      }
      add(std::snprintf(text + used, bytes - used, begin ? "; " : " "));
      add(end - begin == 1
              ? std::snprintf(text + used, bytes - used, "lane %d ", begin)
              : std::snprintf(text + used, bytes - used, "lanes %d-%d ", begin, end - 1));
      add(describe_place(text + used, bytes - used, first));
      begin = end;
    }
    add(std::snprintf(text + used, bytes - used, "; %d cp.async pending\n", pending));
  }
}

}  // namespace fc_host
