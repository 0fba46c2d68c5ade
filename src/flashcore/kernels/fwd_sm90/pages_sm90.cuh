// fwd_sm90/pages_sm90.cuh - K and V from the pages of a cache by TMA.
//
// A key tile comes in boxes, each of which lies in one page. Lane l of the producer warp looks up
// and loads box l of every tile, so that the entries of the page table come side by side, and a
// tile ahead: they take as long as the keys. A tile that is one box is loaded by one thread. Under
// WHOLE_ROWS a box has all columns of its rows, else there is one for each chunk of columns.
//
// Of the last page there are rows behind the sequence's last key, which may hold NaN. Scores of
// such keys are hidden; but 0 times NaN is NaN, so values must be zeros there: boxes of V end where
// the sequence ends (make_ragged in kernels/fwd_sm90/params.py). A box without a key of the
// sequence comes from behind the end of a page of K, where TMA reads zeros.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/pages.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"
#include "fwd_sm90/layout_sm90.cuh"

constexpr int NUM_BOXES = BLOCK_N / BOX_ROWS;
static_assert(NUM_BOXES <= 32, "a lane each");
// Or the tile lies in one page, and one thread loads it.
constexpr bool LOADS_BY_LANES = PAGED && NUM_BOXES > 1;
static_assert(BOX_ROWS % 8 == 0, "swizzling goes over eight rows");

// The boxes of one lane.
struct PageBoxes {
  const AttnSm90Params& params;
  GmemPtr<const int32_t> entries;  // of the sequence
  int num_keys;                    // of the sequence
  int head;                        // of K and V
  // Entries of the page table: of the next K to be loaded, of K, and of V, one tile behind K.
  int next[KEY_SLICES], of_k[KEY_SLICES], of_v[KEY_SLICES];

  // Goes to another row tile, whose first key tile of each slice is `n_block` - slice.
  FC_DEVICE void begin(const AttnParams& own, const BlockCoord& block, const Range& keys,
                       int n_block) {
    entries = pages_of(params.attn, block.batch_idx);
    num_keys = own.seqlen_k;
    head = block.head_idx_kv;
#pragma unroll
    for (int s = 0; s < KEY_SLICES; ++s) next[s] = look_up(keys, n_block - s);
  }

  // Makes the entry that was looked up that of K, and looks up that of key tile `n_block`.
  FC_DEVICE void advance(int slice, const Range& keys, int n_block) {
    of_v[slice] = of_k[slice];
    of_k[slice] = next[slice];
    next[slice] = look_up(keys, n_block);
  }

  FC_DEVICE static int own_box() { return LOADS_BY_LANES ? lane_idx() : 0; }
  FC_DEVICE static int first_key(int n_block) { return n_block * BLOCK_N + own_box() * BOX_ROWS; }

  // The entry as it is: who waits for it to check it would wait here.
  FC_DEVICE int look_up(const Range& keys, int n_block) const {
    const int key = first_key(n_block);
    const bool is_read = n_block >= keys.begin && own_box() < NUM_BOXES && key < num_keys;
    return is_read ? gmem_load(entries + key / PAGE_SIZE) : 0;
  }

  // `await` waits until the tile may be written: what can be known before is found before.
  template <class Await>
  FC_DEVICE void load_k(KLoad tile, SmemPtr<uint64_t> full, int slice, int n_block,
                        const Await& await) const {
    const int key = first_key(n_block);
    const int page = checked_page(params.attn, of_k[slice]);
    const int row_of_page = key < num_keys ? key % PAGE_SIZE : PAGE_SIZE;
    // Under WHOLE_ROWS a map of eight rows each, counted over all pages.
    const int row = opaque(!WHOLE_ROWS ? row_of_page : key < num_keys ? 0 : 8);
    const int rows_before = page * params.attn.lengths.k_rows_per_batch + key % PAGE_SIZE;
    const int batch = opaque(WHOLE_ROWS ? rows_before / 8 : page);
    await();
    if (own_box() >= NUM_BOXES) return;
    const KLoad to = tile.rows_from(own_box() * BOX_ROWS);
    if constexpr (WHOLE_ROWS) {
      tma_load_chunks(to.smem, params.k_map, full, 0, row, 0, head, batch);
    } else {
      to.load(0, params.k_map, full, row, head, batch);
    }
  }

  template <class Await>
  FC_DEVICE void load_v(VLoad tile, SmemPtr<uint64_t> full, int slice, int n_block,
                        const Await& await) const {
    const int key = first_key(n_block);
    const int count = opaque(min_i(BOX_ROWS, num_keys - key));
    const int page = checked_page(params.attn, of_v[slice]);
    const int begin = page * params.attn.lengths.v_rows_per_batch + key % PAGE_SIZE;
    const int end = opaque(begin + count);
    await();
    if (own_box() >= NUM_BOXES) return;
    const VLoad to = tile.rows_from(own_box() * BOX_ROWS);
    if (num_keys > n_block * BLOCK_N + (BLOCK_N - BOX_ROWS)) {  // no box is without a key
      load_values(to, full, count, end);
    } else if (count > 0) {
      load_values(to, full, count, end);
    } else {
      load_zeros(to, full);
    }
  }

  // `count` rows of a box of V, which end before row `end` of all pages, and zeros.
  FC_DEVICE void load_values(VLoad to, SmemPtr<uint64_t> full, int count, int end) const {
    if constexpr (WHOLE_ROWS) {
      tma_load_chunks(to.smem, params.v_map, full, 0, BOX_ROWS - count, 0, head, end);
    } else {
      for (int c = 0; c < VLoad::CHUNKS; ++c) {
        tma_load(to.chunk(c), params.v_map, full, c * LOAD_CHUNK, BOX_ROWS - count, head, end);
      }
    }
  }

  FC_DEVICE void load_zeros(VLoad to, SmemPtr<uint64_t> full) const {
    if constexpr (WHOLE_ROWS) {
      static_assert(!WHOLE_ROWS || KLoad::CHUNKS == VLoad::CHUNKS, "boxes of one size");
      tma_load_chunks(to.smem, params.k_map, full, 0, 8, 0, head, 0);
    } else {
      for (int c = 0; c < VLoad::CHUNKS; ++c) {
        tma_load(to.chunk(c), params.k_map, full, 0, PAGE_SIZE, head, 0);
      }
    }
  }
};
