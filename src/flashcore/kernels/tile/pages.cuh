// tile/pages.cuh - keys and values in the pages of a cache, [num_pages, num_heads_kv, PAGE_SIZE,
// dim]: entry j of a sequence's row of the page table is the page of its keys j * PAGE_SIZE to
// (j + 1) * PAGE_SIZE - 1.
//
// Entries behind a sequence's last page are not read; they may be anything. Nobody has checked the
// others either, so they are clamped: whatever they are, no sequence reaches outside of the cache.
#pragma once

#include "prims.cuh"
#include "tile/params.cuh"
#include "tile/sequence.cuh"

// A sequence's row of the page table.
FC_DEVICE GmemPtr<const int32_t> pages_of(const AttnParams& p, int batch_idx) {
  return p.pages.page_table + int64_t(batch_idx) * p.pages.page_table_stride;
}

// The page that an entry names.
FC_DEVICE int checked_page(const AttnParams& p, int entry) {
  return clamp_i(entry, 0, p.pages.num_pages - 1);
}
