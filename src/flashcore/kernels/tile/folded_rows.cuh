// tile/folded_rows.cuh - which query of which head a row is, where the heads of a group are rows of
// one (pack-GQA, FOLDED), so that one row tile has the group's queries, and their keys are read
// once.
//
// Padded queries: row r is query r % num_queries of head r / num_queries, as tensors have it
// (problem/folding.py).
//
// Packed queries: the heads of a query follow one another, so that rows are in the order of
// queries, and a tile of a prompt passes over the keys that it does not see. Each 64 rows, a row
// tile of the portable kernel and what a consumer of the Hopper kernel has, are 64 / heads queries,
// there one box of TMA; where heads do not divide 64, the rows left over are nobody's.
#pragma once

#include "prims.cuh"
#include "tile/params.cuh"

constexpr bool FOLDS_PACKED = FOLDED && (VARLEN == 1 || VARLEN == 4);
constexpr int BOX_OF_ROWS = 64;

// Packed: the heads that are one, and the queries of a box.
FC_DEVICE int heads_folded(const AttnParams& p) { return FOLDS_PACKED ? p.num_queries : 1; }
FC_DEVICE int queries_of_box(const AttnParams& p) { return BOX_OF_ROWS / heads_folded(p); }
FC_DEVICE int rows_of_box(const AttnParams& p) { return queries_of_box(p) * heads_folded(p); }

// Packed: the rows of a sequence's first `count` queries, up to the last one's last.
FC_DEVICE int rows_of_queries(const AttnParams& p, int count) {
  if (!FOLDS_PACKED || count == 0) return count;
  const int queries = queries_of_box(p);
  const int last = count - 1;
  return last / queries * BOX_OF_ROWS + (last % queries + 1) * heads_folded(p);
}

// Packed: of the heads that are one, the number of a row's.
FC_DEVICE int head_of(const AttnParams& p, int row) {
  return FOLDS_PACKED ? row % BOX_OF_ROWS % heads_folded(p) : 0;
}

FC_DEVICE int query_of(const AttnParams& p, int row) {
  if (FOLDS_PACKED) {
    return row / BOX_OF_ROWS * queries_of_box(p) + row % BOX_OF_ROWS / heads_folded(p);
  }
  return FOLDED ? row % p.num_queries : row;
}

// Returns whether a row of a sequence is a query's.
FC_DEVICE bool is_row(const AttnParams& p, int row) {
  const bool is_of_box = !FOLDS_PACKED || row % BOX_OF_ROWS < rows_of_box(p);
  return row < p.seqlen_q && is_of_box;
}
