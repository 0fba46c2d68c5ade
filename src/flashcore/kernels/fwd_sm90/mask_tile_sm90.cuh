// fwd_sm90/mask_tile_sm90.cuh - a mask tensor on its way to the scores. Every consumer warp copies
// the elements of its own 16 rows and the next key tile into shared memory of its own, along the
// rows, as they lie together in global memory, while the tile before is computed. There its lanes
// find those of their scores two by two. (A lane's own loads would take 2 to 8 bytes of each of
// eight rows at a time: eight times as many accesses, and in the middle of the softmax.)
#pragma once

#include "prims.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"

// A mask that all queries share, such as one of padding, has one row.
constexpr int MASK_ROWS = MASK_IS_ROW ? 1 : 16;
constexpr int MASK_ELEMENT_BYTES = int(sizeof(MaskElement));
// The pairs that the lanes of a warp load at a time, four of each of eight rows, lie in different
// banks.
constexpr int MASK_STRIDE = BLOCK_N + (MASK_ELEMENT_BYTES == 1 ? 16 : 8);
constexpr int MASK_WARP_ELEMENTS = MASK_ROWS * MASK_STRIDE;
constexpr bool MASK_IN_PACKETS = MASK_LOAD_BYTES >= 4;
constexpr int MASK_PACKET = MASK_IN_PACKETS ? MASK_LOAD_BYTES / MASK_ELEMENT_BYTES : 2;  // elements
static_assert(!MASK_IS_SHIFTED || 8 % MASK_PACKET == 0, "rows 8 apart are shifted alike");
// True where a warp copies some rows at a time. Packets of several elements lie in one row.
constexpr bool MASK_IN_ROWS = MASK_BY_ADDITION && MASK_IN_PACKETS && MASK_PACKET > 1 &&
                              BLOCK_N >= 2 * MASK_PACKET && 32 % (BLOCK_N / MASK_PACKET) == 0 &&
                              !MASK_IS_ROW && !MASK_IS_SHIFTED;

// Packets of BYTES are aligned units of global memory. Lanes side by side take PACKETS of a row, as
// far as a warp goes: less than whole lines of a cache take longer. A lane's packets lie at fixed
// distances from its first one, or, of SHIFTED rows, nearly so: the time of a call grows with the
// instructions that addresses take.
template <class T, int BYTES, int ROWS, int PACKETS, int SMEM_STRIDE, bool SHIFTED>
struct PacketRows {
  static constexpr int PACKET = BYTES / int(sizeof(T));  // elements
  static constexpr int WHOLE = PACKETS - SHIFTED;        // packets of a row, were it not shifted
  static constexpr int LANES = WHOLE > 16  ? 32
                               : WHOLE > 8 ? 16
                               : WHOLE > 4 ? 8
                               : WHOLE > 2 ? 4
                                           : WHOLE;
  static constexpr int ROW_STEP = 32 / LANES;
  static constexpr int WIDTH = PACKETS * PACKET;

  // Starts copying the elements of rows from `key_begin` on, of `num_keys`, into `strip`; zeros in
  // rows that do not exist. `row_at` gives a row's element 0; rows are `row_stride` apart, and
  // elements of packets of one `col_stride`.
  template <class RowAt>
  FC_DEVICE static void fetch(SmemPtr<T> strip, int key_begin, int num_keys, int num_rows,
                              int64_t row_stride, int64_t col_stride, const RowAt& row_at) {
    const bool starts = SHIFTED && key_begin == 0;
    // A row's last packet may hold more elements than are asked for.
    const bool ends = key_begin + WIDTH > num_keys;
    if (starts || ends) {
      copy<true>(strip, key_begin, num_keys, num_rows, row_stride, col_stride, row_at);
    } else {
      copy<false>(strip, key_begin, num_keys, num_rows, row_stride, col_stride, row_at);
    }
    if (PACKET > 1 && starts) {
      copy_parts<true>(strip, key_begin, num_keys, num_rows, row_stride, row_at);
    }
    if (PACKET > 1 && ends && key_begin < num_keys + PACKET) {
      copy_parts<false>(strip, key_begin, num_keys, num_rows, row_stride, row_at);
    }
  }

  // Packets that lie in a row as a whole. AT_ENDS there are others, and zeros past the end.
  template <bool AT_ENDS, class RowAt>
  FC_DEVICE static void copy(SmemPtr<T> strip, int key_begin, int num_keys, int num_rows,
                             int64_t row_stride, int64_t col_stride, const RowAt& row_at) {
    [[maybe_unused]] constexpr int UNROLL = AT_ENDS ? 1 : 64;  // host compilers do not unroll
    const int lane = opaque(lane_idx());  // or addresses computed once for all tiles live on
    const int row = lane / LANES;
    const int col = lane % LANES * PACKET;
    const int64_t step = PACKET == 1 ? col_stride : 1;
    const auto dst = strip + (row * SMEM_STRIDE + col);
    auto row_src = row_at(row) + (key_begin + col) * step;
#pragma unroll UNROLL
    for (int first = 0; first < ROWS; first += ROW_STEP) {
      if (ROWS % ROW_STEP != 0 && row + first >= ROWS) break;
      const bool exists = first < num_rows - row;
      const int shift = SHIFTED ? misalignment<BYTES>(row_src) / int(sizeof(T)) : 0;
      const int key = key_begin + col - shift;
      const auto src = row_src + -shift;
#pragma unroll UNROLL
      for (int begin = 0; begin < WIDTH; begin += LANES * PACKET) {
        if (PACKETS % LANES != 0 && col + begin >= WIDTH) break;
        const int count = exists ? num_keys - (key + begin) : 0;  // of elements from here on
        if (AT_ENDS && count > 0 && (key + begin < 0 || count < PACKET)) continue;
        cp_async<BYTES>(dst + (first * SMEM_STRIDE + begin), src + begin * step,
                        AT_ENDS ? count > 0 : exists);
      }
      row_src = row_src + ROW_STEP * row_stride;
    }
  }

  // Each row's packet that it starts in, or that it ends in, element by element: beyond there may
  // be no memory.
  template <bool AT_START, class RowAt>
  FC_DEVICE static void copy_parts(SmemPtr<T> strip, int key_begin, int num_keys, int num_rows,
                                   int64_t row_stride, const RowAt& row_at) {
    [[maybe_unused]] constexpr int UNROLL = ROWS > 16 ? 8 : 1;  // more would spill
    constexpr int STEP = 32 / PACKET;
    const int lane = opaque(lane_idx());
    auto src = row_at(lane / PACKET);
#pragma unroll UNROLL
    for (int row = lane / PACKET; row < ROWS; row += STEP) {
      const int shift = SHIFTED ? misalignment<BYTES>(src) / int(sizeof(T)) : 0;
      const int length = num_keys - key_begin + shift;  // from the first packet's start on
      const int begin = AT_START ? 0 : length / PACKET * PACKET;
      const bool is_part = AT_START ? shift > 0 : length > begin && begin >= 0 && begin < WIDTH;
      const int col = begin + lane % PACKET;
      const int key = key_begin + col - shift;
      if (row < num_rows && is_part) {
        T x = {};
        if (key >= 0 && key < num_keys) x = gmem_load(src + key);
        smem_store(strip + (row * SMEM_STRIDE + col), x);
      }
      src = src + STEP * row_stride;
    }
  }
};

// Of rows that are unaligned, or whose packets do not divide a warp.
constexpr bool MASK_BY_PACKET_ROWS =
    MASK_BY_ADDITION && MASK_IN_PACKETS && !MASK_IN_ROWS && !MASK_IS_ROW;
using MaskRows = PacketRows<MaskElement, MASK_LOAD_BYTES, MASK_ROWS,
                            BLOCK_N / MASK_PACKET + MASK_IS_SHIFTED, MASK_STRIDE, MASK_IS_SHIFTED>;

// Elements 2 i and 2 i + 1 of a row, the first one in the lowest bits.
template <class T>
FC_DEVICE Packet<2 * sizeof(T)> mask_pair(T first, T second) {
  Packet<2 * sizeof(T)> pair;
  if constexpr (sizeof(T) == 1) {
    pair.word[0] = uint32_t(first) | uint32_t(second) << 8;
  } else if constexpr (sizeof(T) == 2) {
    pair.word[0] = to_packet(first).word[0] | to_packet(second).word[0] << 16;
  } else {
    pair.word[0] = to_packet(first).word[0];
    pair.word[1] = to_packet(second).word[0];
  }
  return pair;
}

template <class T>
FC_DEVICE T mask_element(Packet<2 * sizeof(T)> pair, int i) {
  if constexpr (sizeof(T) == 1) {
    return (pair.word[0] & (0xffu << 8 * i)) != 0;
  } else {
    Packet<sizeof(T)> one;
    one.word[0] = sizeof(T) == 2 ? pair.word[0] >> 16 * i & 0xffffu : pair.word[i];
    return from_packet<T>(one);
  }
}

// Elements of 2 bytes lie as the tensor cores' fragments do: one instruction loads all eight of a
// lane, where pairs would take four.
constexpr bool MASK_BY_MATRIX =
    MASK_KIND == 2 && MASK_ELEMENT_BYTES == 2 && !MASK_IS_ROW && !MASK_IS_SHIFTED;

// The elements of a fragment of scores that a lane has, two by two.
struct MaskFragment {
  Packet<2 * MASK_ELEMENT_BYTES> pair[4];

  FC_DEVICE MaskElement of(int i) const { return mask_element<MaskElement>(pair[i / 2], i % 2); }
};

// Two neighbours of a row in shared memory.
FC_DEVICE auto load_pair(SmemPtr<MaskElement> p) {
  if constexpr (MASK_IS_SHIFTED) {
    return mask_pair(smem_load(p), smem_load(p + 1));
  } else {
    return smem_load_packet<2 * MASK_ELEMENT_BYTES>(p);
  }
}

// The mask of a warp's 16 rows: in global memory, and the next key tile's part of it. With
// MASK_IS_SHIFTED rows start anywhere in a packet of global memory: packets are copied whole, and a
// row starts as far behind its place in shared memory.
struct MaskStrip {
  GmemPtr<const MaskElement> gmem;  // of the batch and head
  SmemPtr<MaskElement> smem;        // the warp's own
  int n_block_begin;                // there is no key tile before it

  FC_DEVICE GmemPtr<const MaskElement> row_start(const AttnParams& p, int row) const {
    return gmem + (MASK_IS_ROW ? 0 : mask_row(p, row) * p.strides.mask.row);
  }

  // Elements between the start of a packet and that of a row, the same for every key tile, and for
  // a lane's two rows, which are 8 apart.
  FC_DEVICE int shift(const AttnParams& p, int row) const {
    if constexpr (MASK_IS_SHIFTED) {
      return misalignment<MASK_LOAD_BYTES>(row_start(p, row)) / MASK_ELEMENT_BYTES;
    } else {
      return 0;
    }
  }

  // Starts copying a packet of a key tile's part, or copies two elements that are no neighbours;
  // zeros past the sequences' ends. A packet that lies in a row only in part is left to the call
  // with AT_ENDS, which takes its elements one by one: beyond there may be no memory.
  template <bool AT_ENDS>
  FC_DEVICE void fetch_packet(const AttnParams& p, int row_begin, int n_block, int row,
                              int col) const {
    [[maybe_unused]] constexpr int ENDS_UNROLL = MASK_BY_ADDITION ? 1 : MASK_PACKET;
    const int key = n_block * BLOCK_N + col - shift(p, row_begin + row);
    const bool row_exists = MASK_IS_ROW || row_begin + row < p.seqlen_q;
    const int count = row_exists ? p.seqlen_k - key : 0;  // that exist, or more
    const auto dst = smem + (row * MASK_STRIDE + col);
    const auto src =
        row_start(p, row_begin + row) + key * (MASK_IS_SHIFTED ? 1 : p.strides.mask.col);
    if constexpr (MASK_IN_PACKETS) {
      const bool is_whole = key >= 0 && (count <= 0 || count >= MASK_PACKET);
      if (is_whole) {
        cp_async<MASK_LOAD_BYTES>(dst, src, count > 0);
      } else if (AT_ENDS) {
#pragma unroll ENDS_UNROLL
        for (int i = 0; i < MASK_PACKET; ++i) {
          MaskElement x = {};
          if (key + i >= 0 && i < count) x = gmem_load(src + i);
          smem_store(dst + i, x);
        }
      }
    } else {
      MaskElement pair[2] = {};
      if (count > 0) pair[0] = gmem_load(src);
      if (count > 1) pair[1] = gmem_load(src + p.strides.mask.col);
      smem_store_packet(dst, mask_pair(pair[0], pair[1]));
    }
  }

  // Starts copying a key tile's part, but for packets that lie in a row only in part. A lane's
  // packets are some rows apart, so that one addition gives the address of the next: the time of a
  // call grows with the instructions that this takes.
  template <int PACKETS_PER_ROW>
  FC_DEVICE void fetch_rows(const AttnParams& p, int row_begin, int n_block) const {
    constexpr int ROWS = 32 / PACKETS_PER_ROW;  // at a time
    const int lane = opaque(lane_idx());  // or addresses computed once for all tiles live on
    const int row = lane / PACKETS_PER_ROW;
    const int col = lane % PACKETS_PER_ROW * MASK_PACKET;
    const int keys_left = p.seqlen_k - (n_block * BLOCK_N + col);  // that exist, or more
    if (keys_left > 0 && keys_left < MASK_PACKET) return;
    const int rows_left = keys_left > 0 ? p.seqlen_q - (row_begin + row) : 0;
    const auto dst = smem + (row * MASK_STRIDE + col);
    auto src = row_start(p, row_begin + row) + (n_block * BLOCK_N + col);
#pragma unroll
    for (int first = 0; first < MASK_ROWS; first += ROWS) {
      cp_async<MASK_LOAD_BYTES>(dst + first * MASK_STRIDE, src, first < rows_left);
      src = src + ROWS * p.strides.mask.row;
    }
  }

  // Copies a key tile's part of a tree: ones for all keys, then the few elements that there are.
  FC_DEVICE void fetch_tree(const AttnParams& p, int row_begin, int n_block) const {
    const int tree_begin = first_masked_key(p) - n_block * BLOCK_N;  // among the tile's keys
    const int begin = max_i(tree_begin, 0);
    const int width = min_i(p.seqlen_k - n_block * BLOCK_N, BLOCK_N) - begin;
    const int lane = opaque(lane_idx());
    constexpr Packet<16> ONES = {{0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u}};
#pragma unroll 1
    for (int i = lane * 16; i < MASK_WARP_ELEMENTS; i += 32 * 16) smem_store_packet(smem + i, ONES);
    warp_sync();  // orders the ones before other lanes' elements below
#pragma unroll 4
    for (int i = lane; i < MASK_ROWS * width; i += 32) {
      const int row = i / width;
      const int col = begin + i % width;
      if (row_begin + row >= p.seqlen_q) break;
      const auto element = row_start(p, row_begin + row) + (col - tree_begin) * p.strides.mask.col;
      smem_store(smem + (row * MASK_STRIDE + col), gmem_load(element));
    }
  }

  // Starts copying a key tile's part. Packets where the elements of a row are neighbours, else
  // element by element.
  FC_DEVICE void fetch(const AttnParams& p, int row_begin, int n_block) const {
//@if gate qk pv
    return;
//@end
    if (n_block < n_block_begin || is_before_mask<BLOCK_N>(p, n_block * BLOCK_N)) return;
    if constexpr (MASK_IS_TREE) return fetch_tree(p, row_begin, n_block);
    if constexpr (MASK_BY_PACKET_ROWS) {
      MaskRows::fetch(smem, n_block * BLOCK_N, p.seqlen_k,
                      p.seqlen_q - row_begin, p.strides.mask.row, p.strides.mask.col,
                      [&](int row) { return row_start(p, row_begin + row); });
      cp_async_commit();
      return;
    }
    constexpr int PACKETS_PER_ROW = BLOCK_N / MASK_PACKET;
    constexpr int PACKETS = MASK_ROWS * PACKETS_PER_ROW;
    constexpr int FRONT = MASK_IS_SHIFTED ? MASK_PACKET : 0;  // elements of a packet more
    const int lane = opaque(lane_idx());  // or addresses computed once for all tiles live on
    if constexpr (MASK_IN_ROWS) {
      fetch_rows<PACKETS_PER_ROW>(p, row_begin, n_block);
    } else {
      // More would spill. Host compilers do not unroll.
      [[maybe_unused]] constexpr int UNROLL = MASK_IS_SHIFTED ? 2 : MASK_IN_PACKETS ? 4 : 8;
#pragma unroll UNROLL
      for (int first = 0; first < PACKETS; first += 32) {
        const int packet = first + lane;
        if (PACKETS % 32 != 0 && packet >= PACKETS) break;
        const int row = packet / PACKETS_PER_ROW;
        const int col = FRONT + packet % PACKETS_PER_ROW * MASK_PACKET;
        fetch_packet<false>(p, row_begin, n_block, row, col);
      }
    }
    const int keys_left = p.seqlen_k - n_block * BLOCK_N;
    if (MASK_IN_PACKETS && (FRONT > 0 || keys_left < BLOCK_N)) {
      // Each row's first packet, and that in which the row ends, or would end if it existed.
      const int row = lane % 16;
      const int end = keys_left + shift(p, row_begin + row);
      const int last = (end - 1) / MASK_PACKET * MASK_PACKET;
      const bool ends_here = end % MASK_PACKET != 0 && last >= FRONT && last < FRONT + BLOCK_N &&
                             (MASK_IS_ROW || MASK_IN_ROWS || row_begin + row < p.seqlen_q);
      if (row < MASK_ROWS && (lane < 16 ? FRONT > 0 : ends_here)) {
        fetch_packet<true>(p, row_begin, n_block, row, lane < 16 ? 0 : last);
      }
    }
    cp_async_commit();
  }

  // Adds a key tile's part, which must have been fetched, to its scores.
  template <int NUM_FRAGS>
  FC_DEVICE void add_to(WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p, int row_begin,
                        int n_block) const {
    if (is_before_mask<BLOCK_N>(p, n_block * BLOCK_N)) return;
    add_fetched(scores, p, row_begin);
  }

  // Fetches the part of the key tile that comes after one whose part lanes have read.
  FC_DEVICE void fetch_next(const AttnParams& p, int row_begin, int n_block) const {
    warp_sync();  // orders the reads before the next copies
    fetch(p, row_begin, n_block - KEY_SLICES);
  }

  // Waits for the part that was fetched last. Returns where the first element of a lane lies.
  FC_DEVICE SmemPtr<MaskElement> await(const AttnParams& p, int row_begin) const {
    cp_async_wait<0>();
    warp_sync();  // orders every lane's arrived copies before the reads below
    const int lane = opaque(lane_idx());
    const int first_row = MASK_IS_ROW ? 0 : accum_row(lane, 0);
    const int first_col = accum_col(lane, 0) + shift(p, row_begin + first_row);
    return smem + (first_row * MASK_STRIDE + first_col);
  }

  // The elements of fragment n, two by two, from where `await` says.
  FC_DEVICE MaskFragment fragment(SmemPtr<MaskElement> own, int n) const {
    MaskFragment found;
    if constexpr (MASK_BY_MATRIX) {
      WmmaA<MaskElement> matrix;
      wmma_load_a(matrix, smem + n * 16, MASK_STRIDE);
#pragma unroll
      for (int i = 0; i < 4; ++i) found.pair[i].word[0] = matrix.reg[i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int row = MASK_IS_ROW ? 0 : accum_row(0, i);
        found.pair[i / 2] = load_pair(own + (row * MASK_STRIDE + n * 16 + accum_col(0, i)));
      }
    }
    return found;
  }

  // Returns whether this lane's elements of a key tile's part, which must have been fetched, hide
  // all of its keys.
  template <int NUM_FRAGS>
  FC_DEVICE bool hides_all(const AttnParams& p, int row_begin, int n_block) const {
    const auto own = await(p, row_begin);
    bool all = true;
#pragma unroll
    for (int n = 0; n < NUM_FRAGS; ++n) {
      const MaskFragment elements = fragment(own, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) all &= hides_key(elements.of(i));
    }
    return all;
  }

  // Adds the part that was fetched last.
  template <int NUM_FRAGS>
  FC_DEVICE void add_fetched(WmmaAccum (&scores)[NUM_FRAGS], const AttnParams& p,
                             int row_begin) const {
    const auto own = await(p, row_begin);
#pragma unroll
    for (int n = 0; n < NUM_FRAGS; ++n) {
      const MaskFragment elements = fragment(own, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) add_mask(scores[n].x[i], elements.of(i));
    }
  }
};
