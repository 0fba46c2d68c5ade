// global.cpp - tensors in global memory. Each has a 16 TiB range of simulated addresses of its own,
// so that no overrun of one, however far, lands in another.
#include "machine.h"

namespace fc_host {

constexpr int ADDRESS_BITS = 44;
constexpr int COUNTER = 2;  // FcTensor::writable
constexpr int SHARED = 3;
constexpr int SUMS = 4;
constexpr int LOOSE_SUMS = 5;  // in any order
constexpr int32_t UNDER_WAY = INT32_MAX;  // a clock: nobody knows of the add yet

// Index of the tensor whose range holds an address, or -1.
static int tensor_of(uint64_t address) {
  const auto index = int64_t(address >> ADDRESS_BITS) - 1;
  return index >= 0 && index < machine.launch.num_tensors ? int(index) : -1;
}

void grid_dependency_wait() { machine.threads[size_t(current_thread)].access = Access::all; }

void grid_starts_after_wait() {
  machine.threads[size_t(current_thread)].access = Access::all_but_late;
}

static const FcTensor& locate(uint64_t address, int bytes, int alignment, const char* doing,
                              Site site, int64_t& offset) {
  const int index = tensor_of(address);
  if (index < 0) {
    raise_alarm({"out-of-bounds", site, "", -1}, "%s address 0x%llx, which is in no tensor%s",
                doing, static_cast<unsigned long long>(address),
                address < 4096 ? " (a null pointer)" : "");
  }
  const FcTensor& tensor = machine.launch.tensors[index];
  offset = int64_t(address - tensor.address);
  const int64_t element = offset >= 0
                              ? offset / tensor.element_bytes
                              : -((-offset + tensor.element_bytes - 1) / tensor.element_bytes);
  const Access access = machine.threads[size_t(current_thread)].access;
  if (access == Access::none || (access == Access::all_but_late && tensor.is_late)) {
    raise_alarm({"early-access", site, tensor.name, element, index},
                "%s global memory, and its thread has not waited by grid_dependency_wait() for the "
                "kernels before this one, which may still be at it",
                doing);
  }
  if (offset < 0 || offset + bytes > tensor.bytes) {
    raise_alarm({"out-of-bounds", site, tensor.name, element, index},
                "%s %d bytes outside the tensor (%lld bytes from first to last element)", doing,
                bytes, static_cast<long long>(tensor.bytes));
  }
  if (address % uint64_t(alignment) != 0) {
    raise_alarm({"misaligned", site, tensor.name, element, index},
                "%s %d bytes at an address that is not a multiple of %d", doing, bytes, alignment);
  }
  const int64_t last = (offset + bytes - 1) / tensor.element_bytes;
  for (int64_t e = element; e <= last; ++e) {
    if (!tensor.valid[e]) {
      raise_alarm({"out-of-bounds", site, tensor.name, e, index},
                  "%s memory between the tensor's elements (past the end of a row or sequence)",
                  doing);
    }
  }
  return tensor;
}

static bool is_sums(const FcTensor& tensor) {
  return tensor.writable == SUMS || tensor.writable == LOOSE_SUMS;
}

// Counters are what all threads change, by atomics; nothing else may be, and they no other way.
static void check_kind(const FcTensor& tensor, bool is_atomic, Site site) {
  if ((tensor.writable == COUNTER || is_sums(tensor)) == is_atomic) return;
  raise_alarm({"race", site, tensor.name, 0, int(&tensor - machine.launch.tensors)},
              is_atomic ? "adds atomically to a tensor that is no counter"
                        : "touches a counter, which every thread may change, without an atomic");
}

// `bytes` that are read at a multiple of `alignment`: more than `bytes` for the first part of a
// copy, 1 for a row of a TMA box.
const uint8_t* global_source(uint64_t address, int bytes, int alignment, Site site) {
  ++machine.report->gmem_accesses;
  int64_t offset = 0;
  const FcTensor& tensor = locate(address, bytes, alignment, "reads", site, offset);
  check_kind(tensor, false, site);
  if (tensor.writable) {
    const auto index = int(&tensor - machine.launch.tensors);
    const int64_t last = (offset + bytes - 1) / tensor.element_bytes;
    const auto me = uint32_t(current_block * machine.num_threads + current_thread) + 1;
    for (int64_t e = offset / tensor.element_bytes; e <= last; ++e) {
      if (tensor.writer[e] == me) continue;
      if (tensor.writer[e] == 0) {
        raise_alarm({"uninitialized-read", site, tensor.name, e, index},
                    "reads an output element that nothing has written");
      }
      const int block = int(tensor.writer[e] - 1) / machine.num_threads;
      const int thread = int(tensor.writer[e] - 1) % machine.num_threads;
      const bool is_shared = tensor.writable == SHARED;
      if (is_shared && known_of_block(block, thread, tensor.writer_clock[e])) continue;
      set_other_thread(block, thread, unpack_site(tensor.writer_site[e]));
      raise_alarm({"race", site, tensor.name, e, index},
                  is_shared ? "reads what another thread wrote, and no barrier, or ordered "
                              "atomics between blocks, order the two"
                            : "reads an output element that another thread writes");
    }
  }
  return tensor.data + offset;
}

const void* gmem_read(uint64_t address, int bytes, Site site) {
  return global_source(address, bytes, bytes, site);
}

static uint8_t* claim(uint64_t address, int bytes, int alignment, Site site) {
  ++machine.report->gmem_accesses;
  int64_t offset = 0;
  const FcTensor& tensor = locate(address, bytes, alignment, "writes", site, offset);
  check_kind(tensor, false, site);
  const auto index = int(&tensor - machine.launch.tensors);
  const int64_t first = offset / tensor.element_bytes;
  if (!tensor.writable) {
    raise_alarm({"read-only-write", site, tensor.name, first, index}, "writes to an input tensor");
  }
  const auto me = uint32_t(current_block * machine.num_threads + current_thread) + 1;
  const int64_t last = (offset + bytes - 1) / tensor.element_bytes;
  for (int64_t e = first; e <= last; ++e) {
    if (tensor.writer[e] != 0) {
      set_other_thread(int(tensor.writer[e] - 1) / machine.num_threads,
                       int(tensor.writer[e] - 1) % machine.num_threads,
                       unpack_site(tensor.writer_site[e]));
      raise_alarm({"double-write", site, tensor.name, e, index},
                  "an output element is written twice: it must have one owner");
    }
    tensor.writer[e] = me;
    tensor.writer_site[e] = pack_site(site);
    if (tensor.writable == SHARED) {
      tensor.writer_clock[e] = clock_row(current_thread)[current_thread];
    }
  }
  return tensor.data + offset;
}

void* gmem_write(uint64_t address, int bytes, Site site) {
  return claim(address, bytes, bytes, site);
}

static uint8_t* added_to(uint64_t address, int bytes, int alignment, Site site) {
  ++machine.report->gmem_accesses;
  int64_t offset = 0;
  const FcTensor& tensor = locate(address, bytes, alignment, "adds to", site, offset);
  check_kind(tensor, true, site);
  return tensor.data + offset;
}

void* gmem_atomic(uint64_t address, int bytes, Site site) {
  return added_to(address, bytes, bytes, site);
}

// Of bulk_add. An add must know that the one before it is complete: floats add up in an order then.
// Where any order will do nobody knows whose the first one is, so that none may store instead.
uint8_t* global_sums(uint64_t address, int bytes, bool replaces, Site site) {
  uint8_t* place = added_to(address, bytes, 16, site);
  const int index = tensor_of(address);
  const FcTensor& tensor = machine.launch.tensors[index];
  if (tensor.writable == LOOSE_SUMS) {
    if (replaces) {
      raise_alarm({"atomic-order", site, tensor.name, (place - tensor.data) / 4, index},
                  "stores over sums that others add to in any order");
    }
    return place;
  }
  if (tensor.writable != SUMS) {
    raise_alarm({"atomic-order", site, tensor.name, 0, index},
                "adds floats to a tensor whose sums have no order");
  }
  const int64_t first = (place - tensor.data) / 4;
  const auto me = uint32_t(current_block * machine.num_threads + current_thread) + 1;
  uint32_t known_writer = 0;
  int32_t known_clock = 0;
  for (int64_t e = first; e < first + bytes / 4; ++e) {
    const uint32_t writer = tensor.writer[e];
    const int32_t clock = tensor.writer_clock[e];
    if (writer != 0 && (writer != known_writer || clock != known_clock)) {
      const int block = int(writer - 1) / machine.num_threads;
      const int thread = int(writer - 1) % machine.num_threads;
      if (!known_of_block(block, thread, clock, true)) {
        set_other_thread(block, thread, unpack_site(tensor.writer_site[e]));
        if (known_of_block(block, thread, clock)) {
          raise_alarm({"missing-fence", site, tensor.name, e, index},
                      "adds behind another block, and no fence_proxy_async_global() stands between "
                      "the wait for that one and the add");
        }
        raise_alarm({"atomic-order", site, tensor.name, e, index},
                    "adds floats while another add may be under way: nothing says that it is "
                    "complete, and the sum depends on which comes first");
      }
      known_writer = writer;
      known_clock = clock;
    }
    tensor.writer[e] = me;
    tensor.writer_site[e] = pack_site(site);
    tensor.writer_clock[e] = UNDER_WAY;
  }
  return place;
}

// The current thread has waited for an add.
void global_sums_complete(const uint8_t* place, int bytes) {
  for (int i = 0; i < machine.launch.num_tensors; ++i) {
    const FcTensor& tensor = machine.launch.tensors[i];
    if (tensor.writable != SUMS || place < tensor.data || place >= tensor.data + tensor.bytes) {
      continue;
    }
    const int64_t first = (place - tensor.data) / 4;
    for (int64_t e = first; e < first + bytes / 4; ++e) {
      tensor.writer_clock[e] = clock_row(current_thread)[current_thread];
    }
  }
}

uint8_t* global_claim_row(uint64_t address, int bytes, Site site) {
  return claim(address, bytes, 1, site);
}

}  // namespace fc_host
