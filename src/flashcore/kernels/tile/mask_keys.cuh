// tile/mask_keys.cuh - a mask tensor on its way to transposed scores. As in
// fwd_sm90/mask_tile_sm90.cuh every warp copies its own part of the next tile, along the rows, into
// shared memory of its own while the tile before is computed: here 16 keys of all its queries.
#pragma once

#include "prims.cuh"
#include "tile/params.cuh"

// A mask that all queries share has one row.
constexpr int KEY_MASK_ROWS = MASK_IS_ROW ? 1 : BLOCK_M;
// The lanes of a warp read eight keys of each of four queries, two apart, in different banks.
constexpr int KEY_MASK_BYTES = int(sizeof(MaskElement));
constexpr int KEY_MASK_STRIDE = 16 + (KEY_MASK_BYTES == 1 ? 0 : 16 / KEY_MASK_BYTES);
constexpr int KEY_MASK_WARP_ELEMENTS = KEY_MASK_ROWS * KEY_MASK_STRIDE;
constexpr bool KEY_MASK_IN_PACKETS = MASK_LOAD_BYTES >= 4 && !MASK_IS_SHIFTED;
constexpr int KEY_MASK_PACKET = KEY_MASK_IN_PACKETS ? MASK_LOAD_BYTES / KEY_MASK_BYTES : 1;

// The mask of a warp's 16 keys: in global memory, and the next tile's part of it.
struct KeyMaskStrip {
  GmemPtr<const MaskElement> gmem;  // of the batch and head
  SmemPtr<MaskElement> smem;        // the warp's own
  int key_begin;                    // first of the keys

  // Starts copying the part of the queries from m_begin on, zeros past the sequences' ends.
  FC_DEVICE void fetch(const AttnParams& p, int m_begin) const {
    constexpr int PACKETS_PER_ROW = 16 / KEY_MASK_PACKET;
    constexpr int PACKETS = KEY_MASK_ROWS * PACKETS_PER_ROW;
    [[maybe_unused]] constexpr int UNROLL = KEY_MASK_IN_PACKETS ? 4 : 8;
    const int lane = opaque(lane_idx());  // or addresses computed once for all tiles live on
#pragma unroll UNROLL
    for (int first = 0; first < PACKETS; first += 32) {
      const int packet = first + lane;
      if (PACKETS % 32 != 0 && packet >= PACKETS) break;
      const int row = packet / PACKETS_PER_ROW;
      const int col = packet % PACKETS_PER_ROW * KEY_MASK_PACKET;
      const int key = key_begin + col;
      const bool row_exists = MASK_IS_ROW || m_begin + row < p.seqlen_q;
      const int count = row_exists ? p.seqlen_k - key : 0;  // that exist, or more
      const auto dst = smem + (row * KEY_MASK_STRIDE + col);
      const auto src = gmem + ((MASK_IS_ROW ? 0 : (m_begin + row) * p.strides.mask.row) +
                               key * p.strides.mask.col);
      if constexpr (KEY_MASK_IN_PACKETS) {
        if (count <= 0 || count >= KEY_MASK_PACKET) {
          cp_async<MASK_LOAD_BYTES>(dst, src, count > 0);
          continue;
        }
      }
#pragma unroll
      for (int i = 0; i < KEY_MASK_PACKET; ++i) {
        MaskElement x = {};
        if (i < count) x = gmem_load(src + i);
        smem_store(dst + i, x);
      }
    }
    cp_async_commit();
  }

  // Waits for the part that was fetched last. Returns where the first element of a lane lies.
  FC_DEVICE SmemPtr<MaskElement> await() const {
    cp_async_wait<0>();
    warp_sync();  // orders every lane's arrived copies before the reads that follow
    const int lane = opaque(lane_idx());
    return smem + ((MASK_IS_ROW ? 0 : accum_col(lane, 0) * KEY_MASK_STRIDE) + accum_row(lane, 0));
  }

  // Element i of fragment n, from where `await` says.
  FC_DEVICE static MaskElement element(SmemPtr<MaskElement> own, int n, int i) {
    const int row = MASK_IS_ROW ? 0 : n * 16 + accum_col(0, i);
    return smem_load(own + (row * KEY_MASK_STRIDE + accum_row(0, i)));
  }
};
