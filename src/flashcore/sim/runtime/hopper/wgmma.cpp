// wgmma.cpp - asynchronous products of a warpgroup (PTX ISA: wgmma).
//
// A product is issued when all four warps have come to it, and performed later, in order. It reads
// shared memory as an agent of the warpgroup. From its issue to the wait the accumulators live
// here; the threads' own hold NaN, and must still hold it when the products are waited for.
#include <algorithm>
#include <cstring>

#include "host/types.cuh"
#include "../machine.h"

namespace fc_host {

constexpr uint32_t HELD = 0x7fa57fa5u;  // NaN in float32, float16 and bfloat16
constexpr size_t MAX_KNOWN = 48;

static Warpgroup& group_of(int warp) { return machine.sm90.groups[size_t(warp / GROUP_WARPS)]; }

void wgmma_reset() {
  Machine& m = machine;
  m.sm90.groups.resize(size_t(m.num_warps / GROUP_WARPS));
  for (Warpgroup& group : m.sm90.groups) {
    group.first_product = 1;
    group.products.clear();
    group.ready = group.performed = 0;
    group.chains.clear();
  }
  for (Warp& warp : m.warps) {
    WarpSm90& w = warp.sm90;
    w.issued = w.completed = w.fences = w.fences_at_wait = 0;
    w.groups.clear();
    w.known.clear();
    w.waits_for_issue = false;
  }
}

[[noreturn]] static void touched(Site site, Site earlier, const char* what) {
  const int t = current_thread;
  set_other_thread(current_block, t, earlier);
  machine.report->other.lane = -1;
  raise_alarm({"wgmma", site, "", -1, -1, true}, "%s", what);
}

// --- operands in shared memory -------------------------------------------------------------------

struct OperandShape {
  const char* name;
  int lines;        // of 16 bytes times units, one below the other
  int units;        // of 16 bytes in a line
  int row_bytes;    // of the swizzle pattern
  int start, leading, stride;
  bool mn_major;
};

static OperandShape decode(const Operand& operand, int extent, bool mn_major, const char* name,
                           Site site) {
  OperandShape shape = {};
  const uint32_t mode = operand.high >> 30;
  if (mode != 1 && mode != 2) {
    misuse(site, "wgmma: the descriptor's swizzle mode %u is not 1 (128 bytes) or 2 (64)", mode);
  }
  shape.name = name;
  shape.row_bytes = mode == 1 ? 128 : 64;
  shape.start = int(operand.low & 0x3fff) << 4;
  shape.leading = int(operand.low >> 16 & 0x3fff) << 4;
  shape.stride = int(operand.high & 0x3fff) << 4;
  shape.mn_major = mn_major;
  if (shape.start / shape.row_bytes % 8 != 0) {
    raise_alarm({"misaligned", site, operand.view.name, operand.view.index, -1, true},
                "wgmma: operand %s starts at byte %d, inside a swizzle pattern of 8 rows of %d "
                "bytes",
                name, shape.start, shape.row_bytes);
  }
  if (mn_major) {
    shape.lines = 16;
    shape.units = extent / 8;
    if (shape.start % shape.row_bytes != 0) {
      misuse(site, "wgmma: an MN-major operand must start at the first column of its rows");
    }
  } else {
    shape.lines = extent;
    shape.units = 2;
    if (shape.start % shape.row_bytes + 32 > shape.row_bytes) {
      misuse(site, "wgmma: 16 columns of operand %s from byte %d on leave its rows of %d bytes",
             name, shape.start, shape.row_bytes);
    }
  }
  return shape;
}

// Byte offset of 16-byte unit `unit` of line `line`. K-major: lines are along M or N; MN-major:
// along K, and columns that do not fit in a row of the pattern lie `leading` bytes further.
static int place_of(const OperandShape& shape, int line, int unit) {
  int offset = shape.start + line / 8 * shape.stride + line % 8 * shape.row_bytes;
  if (shape.mn_major) {
    const int units_per_row = shape.row_bytes / 16;
    offset += unit / units_per_row * shape.leading + unit % units_per_row * 16;
  } else {
    offset += unit * 16;
  }
  return offset ^ (((offset >> 7) & (shape.row_bytes / 16 - 1)) << 4);
}

// Checks the reads for the 32 lanes of a warp, which must all know the operand's writes, and marks
// them as the warpgroup's.
static void check_operand(const Operand& operand, const OperandShape& shape, int w, Epoch me,
                          Site site) {
  Machine& m = machine;
  const SmemRef& view = operand.view;
  const int end = view.base + view.count * view.element_bytes;
  const PackedSite packed = pack_site(site);
  const int first_lane = m.warps[size_t(w)].first_lane;
  Epoch passed = 0;
  for (int line = 0; line < shape.lines; ++line) {
    for (int unit = 0; unit < shape.units; ++unit) {
      const int place = place_of(shape, line, unit);
      if (place < view.base || place + 16 > end) {
        raise_alarm({"out-of-bounds", site, view.name, (place - view.base) / view.element_bytes, -1,
                     true},
                    "wgmma reads operand %s outside an array of %d elements in shared memory",
                    shape.name, view.count);
      }
      for (int i = place / CELL_BYTES; i < (place + 16) / CELL_BYTES; ++i) {
        Cell& cell = m.cells[size_t(i)];
        if (cell.write == 0 || cell.write != passed) {
          for (int lane = 0; lane < WARP_SIZE; ++lane) {
            shadow_check_unit_read(view, i, clock_row(first_lane + lane), "a wgmma reads", site,
                                   true);
          }
          passed = cell.write;
        }
        if (cell.read != me) shadow_mark_unit_read(cell, me, packed);
      }
    }
  }
}

template <class T>
static void fetch(const OperandShape& shape, float* lines) {
  for (int line = 0; line < shape.lines; ++line) {
    for (int unit = 0; unit < shape.units; ++unit) {
      uint16_t bits[8];
      std::memcpy(bits, machine.smem + place_of(shape, line, unit), 16);
      float* out = lines + (line * shape.units + unit) * 8;
      for (int i = 0; i < 8; ++i) out[i] = to_float(T{bits[i]});
    }
  }
}

// --- registers -----------------------------------------------------------------------------------

static int accum_row(int lane, int i) { return lane / 4 + (i % 4) / 2 * 8; }
static int accum_col(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }

static KnownRegisters* find_known(WarpSm90& warp, const void* lane0, int words) {
  for (KnownRegisters& known : warp.known) {
    if (known.place[0] == lane0 && known.words == words) return &known;
  }
  return nullptr;
}

static void remember_content(KnownRegisters& known) {
  known.content.resize(size_t(known.words) * WARP_SIZE);
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    std::memcpy(known.content.data() + lane * known.words, known.place[lane],
                size_t(known.words) * 4);
  }
}

static bool has_content(const KnownRegisters& known) {
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    if (std::memcmp(known.content.data() + lane * known.words, known.place[lane],
                    size_t(known.words) * 4) != 0) {
      return false;
    }
  }
  return true;
}

// Registers that no pending product holds: a fence must lie between whatever the thread did with
// them and this product. Accumulators count as used as soon as they were waited for.
static KnownRegisters& check_fence(WarpSm90& warp, const void* const* place, int words,
                                   bool are_accumulators, Site site) {
  KnownRegisters* known = find_known(warp, place[0], words);
  const char* what = are_accumulators ? "its accumulators" : "A's registers";
  const int since = !known ? warp.fences_at_wait
                    : are_accumulators ? known->fences_at_landing : -1;
  if (warp.fences <= since || warp.fences == 0) {
    raise_alarm({"wgmma", site, "", -1, -1, true},
                "a wgmma without wgmma_fence() since %s were used last", what);
  }
  if (!known) {
    if (warp.known.size() == MAX_KNOWN) {
      const auto old = std::find_if(warp.known.begin(), warp.known.end(),
                                    [](const KnownRegisters& k) { return !k.is_held; });
      if (old != warp.known.end()) warp.known.erase(old);
    }
    warp.known.push_back({});
    known = &warp.known.back();
    known->words = words;
    std::copy_n(place, WARP_SIZE, known->place);
    remember_content(*known);
  } else if (!has_content(*known)) {
    raise_alarm({"wgmma", site, "", -1, -1, true},
                "a wgmma without wgmma_fence() since %s were written", what);
  }
  return *known;
}

static bool is_held_intact(const float* reg, int count) {
  for (int i = 0; i < count; ++i) {
    if (bits_of(reg[i]) != HELD) return false;
  }
  return true;
}

static void check_held(const Chain& chain, int w, Site site) {
  const WarpSm90& warp = machine.warps[size_t(w)].sm90;
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    const int t = w % GROUP_WARPS * WARP_SIZE + lane;
    if (is_held_intact(chain.reg[t], chain.frags * 8)) continue;
    touched(site, unpack_site(warp.last_issue),
            "the accumulators of a wgmma were written before it was waited for");
  }
}

// The warp's accumulators move into the chain.
static void join_chain(Chain& chain, int w, float* const* reg) {
  const int strip = w % GROUP_WARPS;
  chain.joined |= 1u << strip;
  const int cols = chain.frags * 16;
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    chain.reg[strip * WARP_SIZE + lane] = reg[lane];
    for (int i = 0; i < chain.frags * 8; ++i) {
      const int row = strip * 16 + accum_row(lane, i % 8);
      const int col = i / 8 * 16 + accum_col(lane, i % 8);
      chain.accum[size_t(row * cols + col)] = reg[lane][i];
      std::memcpy(reg[lane] + i, &HELD, 4);
    }
  }
}

// And back.
static void land_chain(Chain& chain, int w, Site site) {
  check_held(chain, w, site);
  WarpSm90& warp = machine.warps[size_t(w)].sm90;
  const int strip = w % GROUP_WARPS;
  chain.joined &= ~(1u << strip);
  const int cols = chain.frags * 16;
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    float* reg = chain.reg[strip * WARP_SIZE + lane];
    for (int i = 0; i < chain.frags * 8; ++i) {
      const int row = strip * 16 + accum_row(lane, i % 8);
      const int col = i / 8 * 16 + accum_col(lane, i % 8);
      reg[i] = chain.accum[size_t(row * cols + col)];
    }
  }
  KnownRegisters* known = find_known(warp, chain.reg[strip * WARP_SIZE], chain.frags * 8);
  if (!known) return;
  known->is_held = false;
  known->fences_at_landing = warp.fences;
}

// --- issue ---------------------------------------------------------------------------------------

static bool same_operand(const Operand& a, const Operand& b) {
  return a.low == b.low && a.high == b.high;
}

static Chain* held_chain(Warpgroup& group, int w, const float* lane0) {
  const int strip = w % GROUP_WARPS;
  for (Chain& chain : group.chains) {
    const float* begin = chain.reg[strip * WARP_SIZE];
    const bool joined = (chain.joined >> strip & 1u) != 0;
    if (joined && lane0 >= begin && lane0 < begin + chain.frags * 8) return &chain;
  }
  return nullptr;
}

static int free_chain(Warpgroup& group, int frags) {
  size_t i = 0;
  while (i < group.chains.size() && (group.chains[i].joined || group.chains[i].products)) ++i;
  if (i == group.chains.size()) group.chains.push_back({});
  group.chains[i].frags = frags;
  group.chains[i].accum.resize(size_t(64 * 16 * frags));
  return int(i);
}

static const WgmmaIssue& issue_of(int lane) {
  return *static_cast<const WgmmaIssue*>(warp_argument(lane));
}

static void join_product(Warpgroup& group, Product& product, int number, int w, Site site) {
  WarpSm90& warp = machine.warps[size_t(w)].sm90;
  const int strip = w % GROUP_WARPS;
  const int words = product.issue.frags * 8;
  float* accum[WARP_SIZE];
  const void* accum_place[WARP_SIZE];
  const void* a_place[WARP_SIZE];
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    const WgmmaIssue& issue = issue_of(lane);
    accum_place[lane] = accum[lane] = issue.accum;
    a_place[lane] = issue.a_reg;
  }
  Chain* held = held_chain(group, w, accum[0]);
  Chain& chain = group.chains[size_t(product.chain)];
  if (held && (held != &chain || held->reg[strip * WARP_SIZE] != accum[0])) {
    touched(site, unpack_site(warp.last_issue),
            "the accumulators of a wgmma overlap those of a pending one of another shape");
  }
  if (held) {
    check_held(chain, w, site);
  } else {
    check_fence(warp, accum_place, words, true, site).is_held = true;
    join_chain(chain, w, accum);
  }
  chain.last[strip] = number;
  if (product.issue.a_reg) {
    if (held_chain(group, w, static_cast<const float*>(a_place[0]))) {
      touched(site, unpack_site(warp.last_issue),
              "A's registers are accumulators of a wgmma that was not waited for");
    }
    check_fence(warp, a_place, 4, false, site);
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
      const int t = strip * WARP_SIZE + lane;
      product.a_place[t] = issue_of(lane).a_reg;
      std::copy_n(issue_of(lane).a_reg, 4, product.a_reg[t]);
    }
  }
  product.joined |= 1u << strip;
}

static void wake_waiting(int first_warp) {
  for (int w = first_warp; w < first_warp + GROUP_WARPS; ++w) {
    WarpSm90& warp = machine.warps[size_t(w)].sm90;
    if (!warp.waits_for_issue) continue;
    warp.waits_for_issue = false;
    wake_warp(w);
  }
}

void wgmma_issue(const WgmmaIssue& mine, Site site) {
  Machine& m = machine;
  WgmmaIssue issue = mine;
  const uint64_t uniform = (uint64_t(issue.b.low) << 32 | issue.a.low) * 31 +
                           uint64_t(issue.b.high) + uint64_t(issue.frags * 2 + issue.accumulate);
  if (!warp_arrive(WarpOp::wgmma, &issue, uniform, site)) return;
  const int w = current_thread / WARP_SIZE;
  if (w / GROUP_WARPS >= int(m.sm90.groups.size())) {
    misuse(site, "wgmma: warp %d is in no whole warpgroup of 4 warps", w);
  }
  WarpSm90& warp = m.warps[size_t(w)].sm90;
  Warpgroup& group = group_of(w);
  const int number = ++warp.issued;
  if (number == group.first_product + int(group.products.size())) {
    const Chain* held = held_chain(group, w, issue_of(0).accum);
    Product product = {};
    product.issue = issue;
    product.chain = held ? int(held - group.chains.data()) : free_chain(group, issue.frags);
    product.site = site;
    product.first_thread = current_thread;
    ++group.chains[size_t(product.chain)].products;
    group.products.push_back(product);
  }
  Product& product = group.products[size_t(number - group.first_product)];
  const WgmmaIssue& first = product.issue;
  if (first.frags != issue.frags || first.accumulate != issue.accumulate ||
      first.is_float16 != issue.is_float16 || !first.a_reg != !issue.a_reg ||
      !same_operand(first.b, issue.b) || !same_operand(first.a, issue.a) ||
      product.site.line != site.line) {
    set_other_thread(current_block, product.first_thread, product.site);
    raise_alarm({"divergence", site, "", -1, -1, true},
                "the warps of a warpgroup issue different wgmma as their product %d", number);
  }
  join_product(group, product, number, w, site);
  const Epoch me = make_epoch(m.agents.groups + w / GROUP_WARPS, number);
  if (!issue.a_reg) {
    check_operand(issue.a, decode(issue.a, 64, issue.a_along_m, "A", site), w, me, site);
  }
  check_operand(issue.b, decode(issue.b, issue.frags * 16, issue.b_along_n, "B", site), w, me,
                site);
  warp.last_issue = pack_site(site);
  if (product.joined == 0xf) {
    group.ready = number;
    wake_waiting(w / GROUP_WARPS * GROUP_WARPS);
  }
  warp_release();
}

// --- performing ----------------------------------------------------------------------------------

template <class T>
static void multiply(const Product& product, Chain& chain) {
  constexpr int MAX_COLS = 256;
  static float a[64 * 16];
  static float b[16 * MAX_COLS];  // as it lies: lines of n or of k
  static float b_by_k[16][MAX_COLS];
  const WgmmaIssue& issue = product.issue;
  const int cols = issue.frags * 16;
  if (issue.a_reg) {
    for (int t = 0; t < GROUP_THREADS; ++t) {
      for (int i = 0; i < 8; ++i) {
        const int row = t / WARP_SIZE * 16 + accum_row(t % WARP_SIZE, i);
        const auto bits = uint16_t(product.a_reg[t][i / 2] >> (i % 2 * 16));
        a[row * 16 + accum_col(t % WARP_SIZE, i)] = to_float(T{bits});
      }
    }
  } else {
    fetch<T>(decode(issue.a, 64, issue.a_along_m, "A", product.site), issue.a_along_m ? b : a);
    for (int k = 0; issue.a_along_m && k < 16; ++k) {
      for (int row = 0; row < 64; ++row) a[row * 16 + k] = b[k * 64 + row];
    }
  }
  fetch<T>(decode(issue.b, cols, issue.b_along_n, "B", product.site), b);
  const int step_of_n = issue.b_along_n ? 1 : 16;
  const int step_of_k = issue.b_along_n ? cols : 1;
  for (int n = 0; n < cols; ++n) {
    for (int k = 0; k < 16; ++k) b_by_k[k][n] = b[n * step_of_n + k * step_of_k];
  }
  if (!issue.accumulate) std::fill(chain.accum.begin(), chain.accum.end(), 0.0f);
  for (int row = 0; row < 64; ++row) {
    float* out = chain.accum.data() + row * cols;
    for (int k = 0; k < 16; ++k) {
      const float x = a[row * 16 + k];
      for (int n = 0; n < cols; ++n) out[n] += x * b_by_k[k][n];
    }
  }
}

static void perform_next(Warpgroup& group) {
  const Product& product = group.products[size_t(++group.performed - group.first_product)];
  ++machine.report->warp_ops;
  Chain& chain = group.chains[size_t(product.chain)];
  if (product.issue.is_float16) {
    multiply<float16>(product, chain);
  } else {
    multiply<bfloat16>(product, chain);
  }
}

void wgmma_perform_some() {
  for (Warpgroup& group : machine.sm90.groups) {
    if (group.performed < group.ready && (next_random() & 1)) perform_next(group);
  }
}

// --- groups --------------------------------------------------------------------------------------

void wgmma_fence(Site site) {
  if (!warp_arrive(WarpOp::wgmma_fence, nullptr, 0, site)) return;
  WarpSm90& warp = machine.warps[size_t(current_thread / WARP_SIZE)].sm90;
  ++warp.fences;
  for (KnownRegisters& known : warp.known) {
    if (!known.is_held) remember_content(known);
  }
  warp_release();
}

void wgmma_commit(Site site) {
  if (!warp_arrive(WarpOp::wgmma_commit, nullptr, 0, site)) return;
  WarpSm90& warp = machine.warps[size_t(current_thread / WARP_SIZE)].sm90;
  warp.groups.push_back(warp.issued);
  warp_release();
}

static void check_a_registers(const Product& product, int w, Site site) {
  if (!product.issue.a_reg) return;
  const int first = w % GROUP_WARPS * WARP_SIZE;
  for (int t = first; t < first + WARP_SIZE; ++t) {
    if (std::memcmp(product.a_place[t], product.a_reg[t], 16) != 0) {
      touched(site, product.site, "A's registers were written before their wgmma was waited for");
    }
  }
}

static void forget_products(Warpgroup& group, int first_warp) {
  int done = group.performed;
  for (int w = first_warp; w < first_warp + GROUP_WARPS; ++w) {
    done = std::min(done, machine.warps[size_t(w)].sm90.completed);
  }
  for (; group.first_product <= done; ++group.first_product) {
    --group.chains[size_t(group.products.front().chain)].products;
    group.products.pop_front();
  }
}

void wgmma_wait(int pending_groups, Site site) {
  Machine& m = machine;
  if (!warp_arrive(WarpOp::wgmma_wait, nullptr, uint64_t(pending_groups), site)) return;
  const int w = current_thread / WARP_SIZE;
  WarpSm90& warp = m.warps[size_t(w)].sm90;
  Warpgroup& group = group_of(w);
  const int committed = warp.groups.empty() ? 0 : warp.groups.back();
  if (warp.issued > committed) {
    touched(site, unpack_site(warp.last_issue),
            "waits while a wgmma was issued that no wgmma_commit() put into a group: it is not "
            "waited for");
  }
  const int index = int(warp.groups.size()) - pending_groups - 1;
  const int wanted = index < 0 ? 0 : warp.groups[size_t(index)];
  while (group.ready < wanted) {
    warp.waits_for_issue = true;
    hold_warp();
  }
  if (wanted > warp.completed) {
    while (group.performed < wanted) perform_next(group);
    for (int number = warp.completed + 1; number <= wanted; ++number) {
      check_a_registers(group.products[size_t(number - group.first_product)], w, site);
    }
    warp.completed = wanted;
    warp.fences_at_wait = warp.fences;
    const int strip = w % GROUP_WARPS;
    for (Chain& chain : group.chains) {
      if ((chain.joined >> strip & 1u) && chain.last[strip] <= wanted) land_chain(chain, w, site);
    }
    const int first = m.warps[size_t(w)].first_lane;
    for (int t = first; t < first + WARP_SIZE; ++t) {
      clock_row(t)[m.agents.products + w] = wanted;
      clocks_derive(clock_row(t));
    }
    forget_products(group, w / GROUP_WARPS * GROUP_WARPS);
  }
  warp_release();
}

void wgmma_hold(const float* accum, int frags, Site site) {
  const int w = current_thread / WARP_SIZE;
  const int t = w % GROUP_WARPS * WARP_SIZE + current_thread % WARP_SIZE;
  if (w / GROUP_WARPS >= int(machine.sm90.groups.size())) return;
  for (const Chain& chain : group_of(w).chains) {
    if (!(chain.joined >> (w % GROUP_WARPS) & 1u)) continue;
    if (accum >= chain.reg[t] + chain.frags * 8 || chain.reg[t] >= accum + frags * 8) continue;
    touched(site, unpack_site(machine.warps[size_t(w)].sm90.last_issue),
            "uses the accumulators of a wgmma that was not waited for");
  }
}

void wgmma_check_exit(int w) {
  const WarpSm90& warp = machine.warps[size_t(w)].sm90;
  if (warp.issued == warp.completed) return;
  raise_alarm({"async-pending", unpack_site(warp.last_issue), "", -1, -1, true},
              "a warp ends with %d wgmma that it never waited for, the last issued here",
              warp.issued - warp.completed);
}

}  // namespace fc_host
