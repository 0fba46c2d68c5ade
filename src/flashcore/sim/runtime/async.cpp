// async.cpp - cp.async: issued, performed at some later moment, seen by its thread after the wait.
#include <cstring>

#include "machine.h"

namespace fc_host {

void async_issue(SmemRef dst, uint64_t src_address, int bytes, bool valid, Site site) {
  Machine& m = machine;
  ++m.report->async_copies;
  const int offset = shadow_locate(dst, bytes, bytes, false, site);
  const uint8_t* src = valid ? global_source(src_address, bytes, bytes, site) : nullptr;
  shadow_begin_async(dst, offset, bytes, site);
  Thread& thread = m.threads[size_t(current_thread)];
  thread.copies.push_back({thread.open_group, dst, offset, bytes, src, false, pack_site(site)});
  ++m.num_pending_copies;
}

void async_perform(AsyncCopy& copy) {
  if (copy.performed) return;
  copy.performed = true;
  if (copy.src) {
    std::memcpy(machine.smem + copy.dst_offset, copy.src, size_t(copy.bytes));
  } else {
    std::memset(machine.smem + copy.dst_offset, 0, size_t(copy.bytes));
  }
}

// Called by the scheduler now and then: some copy of some thread arrives.
void async_perform_some() {
  Machine& m = machine;
  Thread& thread = m.threads[next_random() % uint64_t(m.num_threads)];
  if (!thread.copies.empty()) async_perform(thread.copies[next_random() % thread.copies.size()]);
}

void async_commit(Site) {
  ++machine.threads[size_t(current_thread)].open_group;
  maybe_reschedule();
}

void async_wait(int pending_groups, Site) {
  Thread& thread = machine.threads[size_t(current_thread)];
  size_t done = 0;
  for (; done < thread.copies.size(); ++done) {
    AsyncCopy& copy = thread.copies[done];
    if (copy.group >= thread.open_group - pending_groups) break;
    async_perform(copy);
    shadow_end_async(copy);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + long(done));
  machine.num_pending_copies -= int(done);
  maybe_reschedule();
}

void async_check_exit() {
  const Thread& thread = machine.threads[size_t(current_thread)];
  if (thread.copies.empty()) return;
  const AsyncCopy& copy = thread.copies.front();
  raise_alarm({"async-pending", unpack_site(copy.site), copy.dst.name, copy.dst.index},
              "a thread ends with %d cp.async that it never waited for, the first issued here",
              int(thread.copies.size()));
}

}  // namespace fc_host
