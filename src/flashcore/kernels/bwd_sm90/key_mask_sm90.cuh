// bwd_sm90/key_mask_sm90.cuh - masks on their way to transposed scores, in the kernel of dK and dV.
// As in fwd_sm90/mask_tile_sm90.cuh every warp copies its own part of the next tile, along rows,
// into shared memory of its own while the tile before is computed: here 16 keys of all queries.
#pragma once

#include "prims_sm90.cuh"
#include "tile/params.cuh"
#include "fwd_sm90/mask_tile_sm90.cuh"

// A mask that all queries share has one row.
constexpr int KEY_MASK_ROWS = MASK_IS_ROW ? 1 : BLOCK_M;
constexpr int KEY_MASK_BYTES = int(sizeof(MaskElement));
// The lanes of a warp read eight keys of each of four queries, two apart, in different banks.
constexpr int KEY_MASK_STRIDE = MASK_IS_SHIFTED       ? 24
                                : KEY_MASK_BYTES == 1 ? 16
                                                      : 16 + 16 / KEY_MASK_BYTES;
constexpr int KEY_MASK_WARP_ELEMENTS = KEY_MASK_ROWS * KEY_MASK_STRIDE;
// As MASK_BY_MATRIX in fwd_sm90/mask_tile_sm90.cuh, here of the transposed matrix.
constexpr bool KEY_MASK_BY_MATRIX =
    MASK_KIND == 2 && KEY_MASK_BYTES == 2 && !MASK_IS_ROW && !MASK_IS_SHIFTED;
constexpr int KEY_MASK_PACKET = MASK_LOAD_BYTES >= 4 ? MASK_LOAD_BYTES / KEY_MASK_BYTES : 1;
static_assert(!MASK_IS_SHIFTED || KEY_MASK_PACKET == 8, "rows 8 apart are shifted alike");

// True where a warp copies some rows at a time, by PacketRows. With booleans, and with rows that
// are shifted, that took longer (docs/ladder-backward.md).
constexpr bool KEY_MASK_IN_ROWS =
    MASK_KIND == 2 && MASK_LOAD_BYTES >= 4 && !MASK_IS_SHIFTED && !MASK_IS_ROW;
using KeyMaskRows = PacketRows<MaskElement, MASK_LOAD_BYTES, KEY_MASK_ROWS, 16 / KEY_MASK_PACKET,
                               KEY_MASK_STRIDE, false>;

// The mask of a warp's 16 keys: in global memory, and the next tile's part of it. With
// MASK_IS_SHIFTED rows begin anywhere in a packet of global memory: packets are copied whole, and
// keys lie as far behind their place in shared memory.
struct KeyMaskStrip {
  GmemPtr<const MaskElement> gmem;  // of the batch and head
  SmemPtr<MaskElement> smem;        // the warp's own
  int key_begin;                    // first of the keys, a multiple of 16

  FC_DEVICE GmemPtr<const MaskElement> row_start(const AttnParams& p, int row) const {
    return gmem + (MASK_IS_ROW ? 0 : row * p.strides.mask.row);
  }

  // Elements between the start of a packet and that of a row, the same for rows 8 apart.
  FC_DEVICE int shift(const AttnParams& p, int row) const {
    if constexpr (MASK_IS_SHIFTED) {
      return misalignment<MASK_LOAD_BYTES>(row_start(p, row)) / KEY_MASK_BYTES;
    } else {
      return 0;
    }
  }

  // Starts copying the part of the queries from m_begin on, zeros past the sequences' ends. A
  // packet that lies in a row only in part is taken element by element: beyond there may be no
  // memory.
  FC_DEVICE void fetch(const AttnParams& p, int m_begin) const {
    if constexpr (KEY_MASK_IN_ROWS) {
      KeyMaskRows::fetch(smem, key_begin, p.seqlen_k, p.seqlen_q - m_begin,
                         p.strides.mask.row, p.strides.mask.col,
                         [&](int row) { return row_start(p, m_begin + row); });
      cp_async_commit();
      return;
    }
    constexpr int PACKETS_PER_ROW = (MASK_IS_SHIFTED ? 24 : 16) / KEY_MASK_PACKET;
    constexpr int PACKETS = KEY_MASK_ROWS * PACKETS_PER_ROW;
    // More would spill. Host compilers do not unroll.
    [[maybe_unused]] constexpr int UNROLL = MASK_IS_SHIFTED ? 2 : KEY_MASK_PACKET > 1 ? 4 : 8;
    const int lane = opaque(lane_idx());  // or addresses computed once for all tiles live on
#pragma unroll UNROLL
    for (int first = 0; first < PACKETS; first += 32) {
      const int packet = first + lane;
      if (PACKETS % 32 != 0 && packet >= PACKETS) break;
      const int row = packet / PACKETS_PER_ROW;
      const int col = packet % PACKETS_PER_ROW * KEY_MASK_PACKET;
      const int key = key_begin + col - shift(p, m_begin + row);
      const bool row_exists = MASK_IS_ROW || m_begin + row < p.seqlen_q;
      const int count = row_exists ? p.seqlen_k - key : 0;  // that exist, or more
      const auto dst = smem + (row * KEY_MASK_STRIDE + col);
      const auto src =
          row_start(p, m_begin + row) + key * (MASK_IS_SHIFTED ? 1 : p.strides.mask.col);
      if constexpr (MASK_LOAD_BYTES >= 4) {
        if (count <= 0 || (key >= 0 && count >= KEY_MASK_PACKET)) {
          cp_async<MASK_LOAD_BYTES>(dst, src, count > 0);
          continue;
        }
      }
#pragma unroll
      for (int i = 0; i < KEY_MASK_PACKET; ++i) {
        MaskElement x = {};
        if (key + i >= 0 && i < count) x = gmem_load(src + i);
        smem_store(dst + i, x);
      }
    }
    cp_async_commit();
  }

  // Where a lane's first elements of two neighbouring queries lie.
  struct Place {
    SmemPtr<MaskElement> even, odd;
  };

  // Waits for the part of the queries from m_begin on, which was fetched last.
  FC_DEVICE Place await(const AttnParams& p, int m_begin) const {
    cp_async_wait<0>();
    warp_sync();  // orders every lane's arrived copies before the reads
    const int lane = opaque(lane_idx());
    const int row = MASK_IS_ROW ? 0 : accum_col(lane, 0);
    const auto first = smem + (row * KEY_MASK_STRIDE + accum_row(lane, 0));
    const auto second = first + (MASK_IS_ROW ? 0 : KEY_MASK_STRIDE);
    return {first + shift(p, m_begin + row), second + shift(p, m_begin + row + 1)};
  }

  // Reads the elements of fragment n.
  template <class T>
  FC_DEVICE void read(T (&elements)[8], const Place& own, int n) const {
    if constexpr (KEY_MASK_BY_MATRIX) {
      WmmaA<T> matrix;
      wmma_load_a_col(matrix, smem + n * 16 * KEY_MASK_STRIDE, KEY_MASK_STRIDE);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        elements[i] = from_packet<T>({{matrix.reg[i / 2] >> i % 2 * 16 & 0xffffu}});
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = MASK_IS_ROW ? 0 : n * 16 + accum_col(0, i) - i % 2;
        const auto of_query = i % 2 == 0 ? own.even : own.odd;
        elements[i] = smem_load(of_query + (row * KEY_MASK_STRIDE + accum_row(0, i)));
      }
    }
  }
};
