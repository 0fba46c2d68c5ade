// tile/rows.cuh - where the rows of Q, K and V lie, for load_tile in tile/copy.cuh.
#pragma once

#include "prims.cuh"
#include "tile/folded_rows.cuh"
#include "tile/pages.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/sequence.cuh"

// The rows of a matrix that are one stride apart.
template <class T>
struct EvenRows {
  GmemPtr<const T> gmem;
  int stride;

  // The matrix from some row and column on.
  FC_DEVICE EvenRows from(int row, int col) const {
    return {gmem + (int64_t(row) * stride + col), stride};
  }
  // The address of an element. Where a row is not `valid`, nobody reads from it.
  FC_DEVICE GmemPtr<const T> at(int row, int col, bool /* valid */) const {
    return gmem + (int64_t(row) * stride + col);
  }
};

// The rows of Q of a packed sequence whose heads are FOLDED, in the form of EvenRows. Rows that are
// nobody's have what the next queries have: no result is made of it.
struct FoldedRows {
  const AttnParams& p;
  GmemPtr<const Element> first_head;  // of those that are one
  int first = 0;

  FC_DEVICE FoldedRows from(int row, int col) const { return {p, first_head + col, first + row}; }
  FC_DEVICE GmemPtr<const Element> at(int row, int col, bool valid) const {
    if (!valid) return first_head;
    const int own = first + row;
    const int64_t query = query_of(p, own) * int64_t(p.strides.q.row);
    return first_head + (query + head_of(p, own) * p.strides.q.head + col);
  }
};

// The rows of a block's head of q, of its sequence, which begin at `head`.
template <bool ARE_FOLDED = FOLDS_PACKED>
FC_DEVICE auto rows_of_q(const AttnParams& p, GmemPtr<const Element> head) {
  if constexpr (ARE_FOLDED) {
    return FoldedRows{p, head};
  } else {
    return EvenRows<Element>{head, p.strides.q.row};
  }
}

// The rows of K or V of a sequence's head, in the form of EvenRows.
struct PagedRows {
  const AttnParams& p;
  GmemPtr<const int32_t> entries;
  GmemPtr<const CacheElement> head;  // in page 0
  TensorStrides strides;
  int first = 0;

  FC_DEVICE PagedRows from(int row, int col) const {
    return {p, entries, head + col, strides, first + row};
  }
  FC_DEVICE GmemPtr<const CacheElement> at(int row, int col, bool valid) const {
    if (!valid) return head;
    const int key = first + row;
    const int64_t page = checked_page(p, gmem_load(entries + key / PAGE_SIZE));
    return head + (page * strides.batch + int64_t(key % PAGE_SIZE) * strides.row + col);
  }
};

// Where the keys or values of a block's head begin: of its sequence, or of page 0.
FC_DEVICE GmemPtr<const CacheElement> keys_of_head(const BlockCoord& block,
                                                   GmemPtr<const CacheElement> tensor,
                                                   const TensorStrides& strides) {
  const int first = PAGED ? 0 : block.batch_idx;
  return tensor + (first * strides.batch + block.head_idx_kv * strides.head);
}

// The rows from there on.
template <bool IN_PAGES = PAGED>
FC_DEVICE auto rows_of_keys(const AttnParams& p, const BlockCoord& block,
                            GmemPtr<const CacheElement> head, const TensorStrides& strides) {
  if constexpr (IN_PAGES) {
    return PagedRows{p, pages_of(p, block.batch_idx), head, strides};
  } else {
    return EvenRows<CacheElement>{head, strides.row};
  }
}
