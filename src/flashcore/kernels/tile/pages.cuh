// tile/pages.cuh - keys and values in the pages of a cache, [num_pages, num_heads_kv, PAGE_SIZE,
// dim]: entry j of a sequence's row of the page table is the page of its keys j * PAGE_SIZE to
// (j + 1) * PAGE_SIZE - 1.
//
// Entries behind a sequence's last page are not read; they may be anything. Nobody has checked the
// others either, so they are clamped: whatever they are, no sequence reaches outside of the cache.
#pragma once

// The page of a key that the sequence has.
template <int SIZE = PAGE_SIZE>
FC_DEVICE int page_of(const AttnParams& p, int batch_idx, int key) {
  const auto row = p.pages.page_table + int64_t(batch_idx) * p.pages.page_table_stride;
  return clamp_i(gmem_load(row + key / SIZE), 0, p.pages.num_pages - 1);
}

// The rows of K or V of a sequence's head, in the form of EvenRows.
template <int SIZE = PAGE_SIZE>
struct PagedRows {
  const AttnParams& p;
  int batch_idx;
  GmemPtr<const Element> head;  // in page 0
  int64_t page_stride;
  int row_stride;
  int first = 0;

  FC_DEVICE PagedRows from(int row, int col) const {
    return {p, batch_idx, head + col, page_stride, row_stride, first + row};
  }
  FC_DEVICE GmemPtr<const Element> at(int row, int col, bool valid) const {
    if (!valid) return head;
    const int key = first + row;
    const int64_t page = page_of(p, batch_idx, key);
    return head + (page * page_stride + int64_t(key % SIZE) * row_stride + col);
  }
};

// Where the keys or values of a block's head begin: of its sequence, or of page 0.
FC_DEVICE GmemPtr<const Element> keys_of_head(const BlockCoord& block,
                                              GmemPtr<const Element> tensor,
                                              const TensorStrides& strides) {
  const int first = PAGED ? 0 : block.batch_idx;
  return tensor + (first * strides.batch + block.head_idx_kv * strides.head);
}

// The rows from there on.
template <int SIZE = PAGE_SIZE>
FC_DEVICE auto rows_of_keys(const AttnParams& p, const BlockCoord& block,
                            GmemPtr<const Element> head, const TensorStrides& strides) {
  if constexpr (SIZE > 0) {
    return PagedRows<SIZE>{p, block.batch_idx, head, strides.batch, strides.row};
  } else {
    return EvenRows{head, strides.row};
  }
}
