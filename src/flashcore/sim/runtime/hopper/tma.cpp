// tma.cpp - boxes between tensors and shared memory, moved by a unit of its own (PTX ISA:
// cp.async.bulk.tensor). Everything is checked when it is issued.
#include <algorithm>
#include <cstring>

#include "../machine.h"

namespace fc_host {

constexpr int MAX_ROW_BYTES = 512;

void tma_reset() {
  Sm90& sm90 = machine.sm90;
  sm90.loads.clear();
  sm90.storers.clear();
  sm90.num_pending_stores = 0;
}

// --- geometry ------------------------------------------------------------------------------------

// Where a byte of a box lies: 16-byte units are permuted by bits of the address.
static int swizzled(int offset, int swizzle_bytes) {
  const int mask = swizzle_bytes / 16 - 1;
  return swizzle_bytes == 0 ? offset : offset ^ (((offset >> 7) & mask) << 4);
}

static int heads_of_box(const TensorMap& map) { return std::max(1, int(map.box_heads)); }

static int chunks_of_box(const TensorMap& map) { return std::max(1, int(map.chunks)); }
static int batches_of_box(const TensorMap& map) { return std::max(1, int(map.box_batches)); }

// Of all heads, chunks and batches.
static int rows_of_box(const TensorMap& map) {
  return int(map.box_rows) * heads_of_box(map) * chunks_of_box(map) * batches_of_box(map);
}

// Returns whether heads, or rows, and batches are one stride apart: both name the same rows.
// Batches of a single line are that far apart in any contiguous tensor: an H200 gives zeros.
static bool is_ragged(const TensorMap& map, uint64_t stride_bytes, uint32_t lines) {
  return lines > 1 && map.batches > 1 && map.batch_stride_bytes == stride_bytes;
}

// `chunk` is -1 where the instruction has four coordinates.
static int check_box(const TensorMap& map, const SmemRef& ref, int col, int row, int chunk,
                     int head, Site site) {
  const auto row_bytes = int(map.box_cols * map.element_bytes);
  const auto swizzle = int(map.swizzle_bytes);
  if (map.base % 16 || map.row_stride_bytes % 16 || map.head_stride_bytes % 16 ||
      map.batch_stride_bytes % 16) {
    misuse(site, "a tensor map's address and strides must be multiples of 16 bytes");
  }
  if (col * int(map.element_bytes) % 16 != 0) {
    misuse(site, "a box starts at column %d of %u-byte elements: a GPU takes it for an illegal "
           "instruction unless that is a multiple of 16 bytes", col, map.element_bytes);
  }
  const bool has_heads =
      heads_of_box(map) > 1 && is_ragged(map, map.head_stride_bytes, map.heads);
  const int line = has_heads ? head : row;
  const auto lines = has_heads ? map.heads : map.rows;
  if ((has_heads || is_ragged(map, map.row_stride_bytes, map.rows)) && line >= int(lines)) {
    misuse(site, "a box starts at row %d of a map whose %u rows and batches are one stride apart: "
           "a GPU takes its address for a fault, instead of zeros", line, lines);
  }
  if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128) {
    misuse(site, "a tensor map swizzles 0, 32, 64 or 128 bytes, not %d", swizzle);
  }
  if (row_bytes % 16 || row_bytes > MAX_ROW_BYTES || (swizzle != 0 && row_bytes != swizzle)) {
    misuse(site,
           "a box's rows of %d bytes, swizzled by %d: the simulator takes rows as long as the "
           "swizzle",
           row_bytes, swizzle);
  }
  if (map.box_cols > 256 || map.box_rows > 256 || map.box_rows == 0 || map.box_cols == 0 ||
      map.box_heads > 256 || map.chunks > 256 || map.box_batches > 256) {
    misuse(site, "a box has 1 to 256 rows, columns and heads, not %u x %u x %u", map.box_rows,
           map.box_cols, map.box_heads);
  }
  if ((map.chunks == 0) != (chunk < 0) || (map.chunks != 0 && map.box_heads > 1)) {
    misuse(site, "a box of a tensor in chunks has five coordinates, and one head; others four");
  }
  return shadow_locate(ref, row_bytes * rows_of_box(map), 128, false, site);
}

// The part of a box's head that lies in the tensor.
struct Clip {
  bool any;
  int first_row, end_row;    // of the box's head
  int skipped, bytes;        // of a row
  uint64_t address;          // of the first row's first byte
};

static Clip clip(const TensorMap& map, int col, int row, int head, int batch) {
  const auto size = int(map.element_bytes);
  const int first_col = std::max(0, -col);
  const int end_col = std::min(int(map.box_cols), int(map.cols) - col);
  Clip result = {};
  result.first_row = std::max(0, -row);
  result.end_row = std::min(int(map.box_rows), int(map.rows) - row);
  result.skipped = first_col * size;
  result.bytes = (end_col - first_col) * size;
  result.any = result.bytes > 0 && result.first_row < result.end_row && head >= 0 &&
               head < int(map.heads) && batch >= 0 && batch < int(map.batches);
  result.address = map.base + uint64_t(batch) * map.batch_stride_bytes +
                   uint64_t(head) * map.head_stride_bytes +
                   uint64_t(row + result.first_row) * map.row_stride_bytes +
                   uint64_t((col + first_col) * size);
  return result;
}

// --- loads ---------------------------------------------------------------------------------------

void tma_load(SmemRef dst, const TensorMap& map, SmemRef bar_ref, int col, int row, int chunk,
              int head, int batch, Site site) {
  Machine& m = machine;
  ++m.report->async_copies;
  const int t = current_thread;
  const int index = mbarrier_find(bar_ref, site);
  MBarrier& bar = m.sm90.mbarriers[size_t(index)];
  const int offset = check_box(map, dst, col, row, chunk, head, site);
  const int32_t* clock = clock_row(t);
  if (clock[m.agents.fenced + bar.init_thread] < clock_of(bar.init)) {
    set_other_thread(current_block, bar.init_thread, unpack_site(bar.init_site));
    raise_alarm({"missing-fence", site, bar_ref.name, bar_ref.index},
                "a TMA load completes on an mbarrier that was initialised, and no "
                "mbar_init_fence() stands between the two");
  }
  const auto row_bytes = int(map.box_cols * map.element_bytes);
  const int bytes = row_bytes * rows_of_box(map);
  if (bar.bytes_under_way + bytes > bar.tx) {
    raise_alarm({"mbarrier", site, bar_ref.name, bar_ref.index},
                "loads %d bytes where %d are announced and %d of them under way: the phase would "
                "complete too early",
                bytes, bar.tx, bar.bytes_under_way);
  }
  bar.bytes_under_way += bytes;
  bar.last_issuer = t;
  bar.phase_of_loads = bar.phase + 1;
  bar.last_dst = dst;
  bar.last_site = pack_site(site);
  const Epoch me = make_epoch(m.agents.mbarriers + index, bar.phase + 1);
  shadow_write_by_unit(dst, offset, bytes, me, clock, site);

  TmaLoad load = {};
  load.mbarrier = index;
  load.dst_offset = offset;
  load.rows = rows_of_box(map);
  load.row_bytes = row_bytes;
  load.swizzle_bytes = int(map.swizzle_bytes);
  load.src.assign(size_t(load.rows), nullptr);
  const int chunks = chunks_of_box(map);
  const int planes = heads_of_box(map) * chunks * batches_of_box(map);
  for (int h = 0; h < planes; ++h) {  // a head's rows, or those of a chunk of a batch
    const int own_chunk = std::max(0, chunk) + h % chunks;
    const int own_head = chunk < 0 ? head + h : head;
    Clip part = clip(map, col, row, own_head, chunk < 0 ? batch : batch + h / chunks);
    if (!part.any || own_chunk >= chunks) continue;
    part.address += uint64_t(own_chunk) * map.box_cols * map.element_bytes;
    load.skipped_bytes = part.skipped;
    load.valid_bytes = part.bytes;
    for (int r = part.first_row; r < part.end_row; ++r) {
      const uint64_t rows = uint64_t(r - part.first_row);
      load.src[size_t(h * int(map.box_rows) + r)] =
          global_source(part.address + rows * map.row_stride_bytes, part.bytes, 1, site);
    }
  }
  m.sm90.loads.push_back(std::move(load));
  maybe_reschedule();
}

static void perform(const TmaLoad& load) {
  uint8_t row[MAX_ROW_BYTES];
  for (int r = 0; r < load.rows; ++r) {
    std::memset(row, 0, sizeof row);
    if (load.src[size_t(r)]) {
      std::memcpy(row + load.skipped_bytes, load.src[size_t(r)], size_t(load.valid_bytes));
    }
    for (int b = 0; b < load.row_bytes; b += 16) {
      const int place = swizzled(load.dst_offset + r * load.row_bytes + b, load.swizzle_bytes);
      std::memcpy(machine.smem + place, row + b, 16);
    }
  }
}

// Some load that is under way arrives. False when there is none.
bool tma_perform_load() {
  auto& loads = machine.sm90.loads;
  if (loads.empty()) return false;
  const size_t i = next_random() % loads.size();
  std::swap(loads[i], loads.back());
  const TmaLoad load = std::move(loads.back());
  loads.pop_back();
  perform(load);
  mbarrier_complete_tx(load.mbarrier, load.rows * load.row_bytes);
  return true;
}

// --- stores --------------------------------------------------------------------------------------

static Storer& storer_of(int t, Site site) {
  Sm90& sm90 = machine.sm90;
  int& slot = machine.threads[size_t(t)].store_slot;
  if (slot < 0) {
    if (int(sm90.storers.size()) == MAX_STORERS) {
      misuse(site, "the simulator can track bulk stores of %d threads of a block", MAX_STORERS);
    }
    slot = int(sm90.storers.size());
    sm90.storers.push_back({t, machine.threads[size_t(t)].empty_groups, {}, {}});
  }
  return sm90.storers[size_t(slot)];
}

void tma_store(const TensorMap& map, SmemRef src, int col, int row, int head, int batch,
               Site site) {
  Machine& m = machine;
  ++m.report->async_copies;
  const int t = current_thread;
  const int offset = check_box(map, src, col, row, -1, head, site);
  Storer& storer = storer_of(t, site);
  TmaStore store = {};
  store.group = storer.committed;
  store.src = src;
  store.src_offset = offset;
  store.row_bytes = int(map.box_cols * map.element_bytes);
  store.swizzle_bytes = int(map.swizzle_bytes);
  store.site = pack_site(site);
  store.dst.assign(size_t(rows_of_box(map)), nullptr);
  const Epoch me = make_epoch(m.agents.stores + m.threads[size_t(t)].store_slot,
                              storer.committed + 1);
  for (int h = 0; h < heads_of_box(map); ++h) {
    const Clip part = clip(map, col, row, head + h, batch);
    if (!part.any) continue;
    if (part.skipped != 0) misuse(site, "the simulator stores no box that begins left of a tensor");
    store.valid_bytes = part.bytes;
    for (int r = part.first_row; r < part.end_row; ++r) {
      const int of_box = h * int(map.box_rows) + r;
      for (int b = 0; b < part.bytes; b += 16) {
        const int place = swizzled(offset + of_box * store.row_bytes + b, store.swizzle_bytes);
        shadow_read_by_unit(src, place, std::min(16, part.bytes - b), me, clock_row(t), site);
      }
      const uint64_t rows = uint64_t(r - part.first_row);
      store.dst[size_t(of_box)] =
          global_claim_row(part.address + rows * map.row_stride_bytes, part.bytes, site);
    }
  }
  storer.stores.push_back(std::move(store));
  ++m.sm90.num_pending_stores;
  maybe_reschedule();
}

// As a store of one row, which the destination is not claimed for: everybody adds to it.
void bulk_add(uint64_t dst, SmemRef src, int bytes, bool replaces, Site site) {
  Machine& m = machine;
  ++m.report->async_copies;
  const int t = current_thread;
  if (bytes <= 0 || bytes % 16 != 0) {
    misuse(site, "bulk_add moves a multiple of 16 bytes, not %d", bytes);
  }
  const int offset = shadow_locate(src, bytes, 16, false, site);
  Storer& storer = storer_of(t, site);
  TmaStore store = {};
  store.adds = true;
  store.replaces = replaces;
  store.group = storer.committed;
  store.src = src;
  store.src_offset = offset;
  store.row_bytes = store.valid_bytes = bytes;
  store.site = pack_site(site);
  const Epoch me = make_epoch(m.agents.stores + m.threads[size_t(t)].store_slot,
                              storer.committed + 1);
  shadow_read_by_unit(src, offset, bytes, me, clock_row(t), site);
  store.dst.assign(1, global_sums(dst, bytes, replaces, site));
  storer.stores.push_back(std::move(store));
  ++m.sm90.num_pending_stores;
  maybe_reschedule();
}

static void add_floats(uint8_t* dst, const uint8_t* src, int bytes) {
  for (int b = 0; b < bytes; b += 4) {
    float sum, x;
    std::memcpy(&sum, dst + b, 4);
    std::memcpy(&x, src + b, 4);
    sum += x;
    std::memcpy(dst + b, &sum, 4);
  }
}

static void perform(TmaStore& store) {
  if (store.performed) return;
  store.performed = true;
  if (store.replaces) {
    std::memcpy(store.dst[0], machine.smem + store.src_offset, size_t(store.valid_bytes));
    return;
  }
  if (store.adds) {
    add_floats(store.dst[0], machine.smem + store.src_offset, store.valid_bytes);
    return;
  }
  for (size_t r = 0; r < store.dst.size(); ++r) {
    if (!store.dst[r]) continue;
    for (int b = 0; b < store.valid_bytes; b += 16) {
      const int place = swizzled(store.src_offset + int(r) * store.row_bytes + b,
                                 store.swizzle_bytes);
      std::memcpy(store.dst[r] + b, machine.smem + place,
                  size_t(std::min(16, store.valid_bytes - b)));
    }
  }
}

void tma_store_commit(Site) {
  Thread& thread = machine.threads[size_t(current_thread)];
  if (thread.store_slot < 0) {
    ++thread.empty_groups;
  } else {
    ++machine.sm90.storers[size_t(thread.store_slot)].committed;
  }
  maybe_reschedule();
}

void tma_store_wait_read(int pending_groups, Site) {
  const int t = current_thread;
  const int slot = machine.threads[size_t(t)].store_slot;
  if (slot < 0) return;
  Storer& storer = machine.sm90.storers[size_t(slot)];
  const int done = storer.committed - pending_groups;
  size_t count = 0;
  for (; count < storer.stores.size() && storer.stores[count].group < done; ++count) {
    perform(storer.stores[count]);
    if (storer.stores[count].adds) storer.adds.push_back(storer.stores[count]);
  }
  storer.stores.erase(storer.stores.begin(), storer.stores.begin() + long(count));
  machine.sm90.num_pending_stores -= int(count);
  int32_t& seen = clock_row(t)[machine.agents.stores + slot];
  seen = std::max(seen, done);
  maybe_reschedule();
}

// Whoever knows what the thread knows from here on knows the adds.
void tma_store_wait(int pending_groups, Site site) {
  tma_store_wait_read(pending_groups, site);
  const int t = current_thread;
  const int slot = machine.threads[size_t(t)].store_slot;
  if (slot < 0) return;
  Storer& storer = machine.sm90.storers[size_t(slot)];
  clocks_tick(t);
  const auto is_complete = [&](const TmaStore& add) {
    if (add.group >= storer.committed - pending_groups) return false;
    global_sums_complete(add.dst[0], add.valid_bytes);
    return true;
  };
  storer.adds.erase(std::remove_if(storer.adds.begin(), storer.adds.end(), is_complete),
                    storer.adds.end());
}

// --- the scheduler's calls -----------------------------------------------------------------------

void tma_perform_some() {
  Sm90& sm90 = machine.sm90;
  tma_perform_load();
  if (sm90.num_pending_stores == 0) return;
  Storer& storer = sm90.storers[next_random() % sm90.storers.size()];
  if (!storer.stores.empty()) perform(storer.stores[next_random() % storer.stores.size()]);
}

void tma_check_thread_exit(int t) {
  const int slot = machine.threads[size_t(t)].store_slot;
  if (slot < 0 || machine.sm90.storers[size_t(slot)].stores.empty()) return;
  const auto& stores = machine.sm90.storers[size_t(slot)].stores;
  const TmaStore& store = stores.front();
  raise_alarm({"async-pending", unpack_site(store.site), store.src.name, store.src.index},
              "a thread ends with %d TMA stores that it did not wait for, the first issued here: "
              "shared memory may be gone before they read it",
              int(stores.size()));
}

void tma_check_block_end() {
  for (const MBarrier& bar : machine.sm90.mbarriers) {
    if (bar.phase_of_loads <= bar.phase_waited_for) continue;
    const SmemRef& dst = bar.last_dst;
    current_thread = bar.last_issuer;
    defer_alarm({"async-pending", unpack_site(bar.last_site), dst.name, dst.index},
                "the block ends without anybody having waited for the TMA load issued here: it may "
                "write into shared memory that is no longer the block's");
  }
}

}  // namespace fc_host
