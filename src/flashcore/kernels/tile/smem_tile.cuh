// tile/smem_tile.cuh - a tile in shared memory, as TMA writes it and WGMMA reads it.
//
// A tile is a row of column chunks. A chunk is all rows x CHUNK (32 or 64) elements, in rows of
// CHUNK_BYTES that TMA swizzles: the eight rows of an 8x8 matrix lie in different banks. Columns
// past the tensor's last one are zeros that TMA fills in. A tile may also be a column of such, one
// for every GROUP rows: TMA then loads all chunks of these rows in one box.
#pragma once

#include "prims_sm90.cuh"

constexpr int CHUNK_BYTES = CHUNK * 2;

// A tile of ROWS x COLS elements, and how to name its parts; COLS is rounded up to whole chunks.
// Where a buffer has several tiles, such as one a stage, tile[i] is the one of number i. A tile may
// have chunks of its own, of CHUNK_COLS columns; those of bytes are not swizzled, and are no
// operands.
template <int ROWS, int COLS, class T = Element, int CHUNK_COLS = CHUNK, int GROUP = ROWS>
struct SmemTile {
  static constexpr int CHUNKS = (COLS + CHUNK_COLS - 1) / CHUNK_COLS;
  static constexpr int CHUNK_ELEMENTS = ROWS * CHUNK_COLS;
  static constexpr int ELEMENTS = CHUNKS * CHUNK_ELEMENTS;
  static constexpr int ROW_BYTES = CHUNK_COLS * int(sizeof(T));  // of a row of a chunk
  static constexpr int BYTES = ELEMENTS * int(sizeof(T));
  static constexpr int GROUP_BYTES = GROUP * ROW_BYTES;  // of a chunk
  // From eight rows, which TMA swizzles together, to the next.
  static constexpr int PATTERN_BYTES = GROUP == 8 ? CHUNKS * GROUP_BYTES : 8 * ROW_BYTES;
  static_assert(ROWS % GROUP == 0 && (GROUP == ROWS || GROUP % 8 == 0), "whole groups");

  SmemPtr<T> smem;

  // `count` tiles from a byte of the block's shared memory on.
  FC_DEVICE static SmemTile view(int byte_offset, int count, const char* name) {
    return {smem_view<T>(byte_offset, count * ELEMENTS, name)};
  }

  FC_DEVICE SmemTile operator[](int index) const { return {smem + index * ELEMENTS}; }

  // The tile from a row on: what TMA loads there, in a box of fewer rows, or an operand, from a
  // multiple of eight on.
  FC_DEVICE SmemTile rows_from(int row) const {
    return {smem + row * (GROUP == ROWS ? CHUNK_COLS : CHUNKS * CHUNK_COLS)};
  }

  // The same of tile `index`, as one sum: ptxas treats two sums, one behind the other, differently.
  FC_DEVICE SmemTile row_of(int index, int row) const {
    return {smem + (index * ELEMENTS + row * CHUNK_COLS)};
  }

  // A narrower tile in the same place.
  template <class Narrower>
  FC_DEVICE Narrower as() const {
    static_assert(Narrower::ELEMENTS <= ELEMENTS, "there is no room for it");
    return {smem};
  }

  FC_DEVICE SmemPtr<T> chunk(int c) const { return smem + c * CHUNK_ELEMENTS; }
  FC_DEVICE SmemPtr<T> chunk_of(int index, int c) const {
    return smem + (index * ELEMENTS + c * CHUNK_ELEMENTS);
  }

  // Where the first row of a chunk has column `col` or, as it is swizzled, another one.
  FC_DEVICE SmemPtr<T> at_start(int c, int col) const {
    return smem + (c * CHUNK_ELEMENTS + col);
  }

  // Eight elements of a row side by side, from column `col` + `ahead` on, in the chunk of `col`.
  FC_DEVICE SmemPtr<T> at(int row, int col, int ahead = 0) const {
    return smem + (col / CHUNK_COLS * CHUNK_ELEMENTS + row * CHUNK_COLS +
                   swizzled_col<ROW_BYTES>(row, col % CHUNK_COLS + ahead));
  }

  // How far that is from the start of the row, for who keeps a row's start in a register.
  FC_DEVICE static int from_row(int row, int col, int ahead) {
    return col / CHUNK_COLS * CHUNK_ELEMENTS +
           swizzled_col<ROW_BYTES>(row, col % CHUNK_COLS + ahead);
  }

  // By one thread: has TMA load tile `index`, whose BYTES count towards `full`.
  FC_DEVICE void load(int index, const TensorMap& map, SmemPtr<uint64_t> full, int row, int head,
                      int batch) const {
    for (int c = 0; c < CHUNKS; ++c) {
      const auto to = smem + (index * ELEMENTS + c * CHUNK_ELEMENTS);
      tma_load(to, map, full, c * CHUNK_COLS, row, head, batch);
    }
  }

  // The tile as an operand of a product that sums over its columns, or over its rows; further
  // columns and rows are so many bytes ahead.
  FC_DEVICE WgmmaDesc over_columns() const {
    return wgmma_desc<ROW_BYTES>(smem, 0, PATTERN_BYTES);
  }
  FC_DEVICE WgmmaDesc over_rows() const {
    return wgmma_desc<ROW_BYTES>(smem, GROUP_BYTES, PATTERN_BYTES);
  }
  FC_DEVICE static constexpr int column_bytes(int col) {
    return col / CHUNK_COLS * GROUP_BYTES + col % CHUNK_COLS * 2;
  }
  FC_DEVICE static constexpr int row_bytes(int row) {
    return row / GROUP * (CHUNKS * GROUP_BYTES) + row % GROUP * ROW_BYTES;
  }

  // One chunk of it, as an operand of a product that sums over its rows; further chunks are so many
  // bytes ahead.
  FC_DEVICE WgmmaDesc chunk_over_rows() const { return wgmma_desc<ROW_BYTES>(smem, 0); }
  FC_DEVICE static constexpr int chunk_bytes(int c) { return c * CHUNK_ELEMENTS * 2; }

  // The same of tile `index`, the same one in all lanes. The compiler has to know, or each
  // descriptor is moved from general to uniform registers, two moves a product.
  FC_DEVICE WgmmaDesc over_columns(int index) const {
    return over_columns() + warp_uniform(index) * BYTES;
  }
  FC_DEVICE WgmmaDesc over_rows(int index) const {
    return over_rows() + warp_uniform(index) * BYTES;
  }
};
