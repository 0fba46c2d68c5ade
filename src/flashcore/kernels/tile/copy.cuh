// tile/copy.cuh - row tiles between global and shared memory.
#pragma once

#include "prims.cuh"

// Row stride of a tile in shared memory, in elements: the columns rounded up to whole 16-wide
// fragments, plus 8 elements (16 bytes) so that the eight rows of an 8x8 matrix fall into different
// banks.
FC_DEVICE constexpr int padded_cols(int cols) { return (cols + 15) / 16 * 16; }
FC_DEVICE constexpr int smem_stride(int cols) { return padded_cols(cols) + 8; }

// How the threads of a block share out ROWS x COLS elements of T in packets, row by row: neighbours
// take neighbouring packets of a row, and every thread keeps to its own columns.
template <int ROWS, int COLS, class T>
struct PacketWalk {
  static constexpr int PACKET = LOAD_BYTES / int(sizeof(T));
  static constexpr int PACKETS_PER_ROW = COLS / PACKET;
  static constexpr int LOWEST_BIT = PACKETS_PER_ROW & -PACKETS_PER_ROW;
  static constexpr int THREADS_PER_ROW = LOWEST_BIT < 16 ? LOWEST_BIT : 16;
  static constexpr int ROWS_PER_PASS = NUM_WARPS * 32 / THREADS_PER_ROW;

  int first_row = thread_idx() / THREADS_PER_ROW;
  int first_col = thread_idx() % THREADS_PER_ROW * PACKET;

  // Calls visit(row, col), counted from the thread's first packet, for each of its packets.
  template <class Visit>
  FC_DEVICE void each(const Visit& visit) const {
#pragma unroll
    for (int row = 0; row < ROWS; row += ROWS_PER_PASS) {
      if (ROWS % ROWS_PER_PASS != 0 && first_row + row >= ROWS) break;
#pragma unroll
      for (int col = 0; col < COLS; col += THREADS_PER_ROW * PACKET) visit(row, col);
    }
  }
};

// Starts copying ROWS x COLS elements from row `first_row` of a matrix; rows from `num_rows` on are
// filled with zeros and not read. With cp.async the copy is pending until this thread's group is
// waited for. A thread's addresses are one base each plus constants.
template <int ROWS, int COLS, int SMEM_STRIDE, class Rows, class T>
FC_DEVICE void load_tile(SmemPtr<T> dst_smem, const Rows& rows, int first_row, int num_rows) {
  const PacketWalk<ROWS, COLS, T> walk;
  const int thread_src_row = opaque(first_row) + walk.first_row;
  const auto src = rows.from(thread_src_row, walk.first_col);
  const auto dst = dst_smem + (walk.first_row * SMEM_STRIDE + walk.first_col);
  walk.each([&](int row, int col) {
    const bool valid = thread_src_row + row < num_rows;
    const auto packet_src = src.at(row, col, valid);
    const auto packet_dst = dst + (row * SMEM_STRIDE + col);
    if constexpr (LOAD_BYTES >= 4) {
      cp_async<LOAD_BYTES>(packet_dst, packet_src, valid);
    } else {
      smem_store(packet_dst, valid ? gmem_load(packet_src) : from_float<T>(0.0f));
    }
  });
}

// A head_dim that is not a multiple of 16 leaves columns that the fragments read and load_tile does
// not write: zeros there add nothing to q.k, and give output columns that are not stored.
template <int ROWS, int COLS, int SMEM_STRIDE>
FC_DEVICE void zero_padding(SmemPtr<Element> tile_smem) {
  constexpr int PADDING = padded_cols(COLS) - COLS;
  if constexpr (PADDING > 0) {
    for (int i = thread_idx(); i < ROWS * PADDING; i += NUM_WARPS * 32) {
      const auto element = tile_smem + (i / PADDING * SMEM_STRIDE + COLS + i % PADDING);
      smem_store(element, from_float<Element>(0.0f));
    }
  }
}

// Stores 16 rows x COLS of one warp from shared memory, 16 bytes a lane. `num_valid_rows` may be
// below 16, or negative.
template <int COLS, int SMEM_STRIDE>
FC_DEVICE void store_rows(GmemPtr<Element> dst_gmem, int dst_row_stride, SmemPtr<Element> src_smem,
                          int num_valid_rows) {
  constexpr int PACKET = 8;
  constexpr int PACKETS_PER_ROW = COLS / PACKET;
  for (int packet = lane_idx(); packet < 16 * PACKETS_PER_ROW; packet += 32) {
    const int row = packet / PACKETS_PER_ROW;
    const int col = packet % PACKETS_PER_ROW * PACKET;
    if (row < num_valid_rows) {
      gmem_store_packet(dst_gmem + (int64_t(row) * dst_row_stride + col),
                        smem_load_packet<16>(src_smem + (row * SMEM_STRIDE + col)));
    }
  }
}
