// bwd_dkdv_dq_sm90.cuh - dQ in the kernel of dK and dV, from dS^T of all the block's keys in shared
// memory:
//
//   dQ = dS K
//
// is added, in float32, to what blocks of other keys have for these rows: if it is ORDERED, in the
// order of the keys, so that floats are added up alike in every run. Else nobody waits for a turn,
// and the kernel before has cleared the sums.
//
// With DQ_ROLE a warpgroup of its own computes it: its products fill the tensor cores while the
// others compute between theirs. Where dK and dV leave no registers for one, two consumers compute
// half of the columns each, a tile later.
//
// Threads of the producer's warpgroup add it, so that nobody else waits for a turn.
//
// Threads write dS and dQ to shared memory; the tensor cores and TMA read them. The proxy fence in
// between is the reader's, behind its wait: a writer's would wait until its stores are done.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/smem_tile.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "bwd_sm90/bwd_dkdv_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"

// Waits until all consumers have handed over dS of a tile.
FC_DEVICE void await_ds(const Barriers& bar, uint32_t count) {
  mbar_wait(bar.ds_full + stage_of<NUM_DS_STAGES>(count), parity_of<NUM_DS_STAGES>(count));
  fence_proxy_async();
}

// DQ_FRAGS column fragments of dQ of 64 rows: dS^T and K lie with keys as lines.
FC_DEVICE void issue_dq(WmmaAccum (&dq)[DQ_FRAGS], const Buffers& smem, int row_group,
                        int first_frag, uint32_t count) {
  const int stage = warp_uniform(stage_of<NUM_DS_STAGES>(count));
  const WgmmaDesc ds = smem.ds.chunk_over_rows() +
                       (stage * DsTile::BYTES + DsTile::chunk_bytes(row_group));
  const WgmmaDesc k = smem.k.over_rows() + QkGroup::chunk_bytes(first_frag * 16 / CHUNK);
  wgmma_fence();
#pragma unroll
  for (int n = 0; n < BLOCK_N / 16; ++n) {
    wgmma_ss_mn<Element>(dq, ds + DsTile::row_bytes(n * 16),
                         k + (n / 4 * QkGroup::BYTES + QkGroup::row_bytes(n % 4 * 16)), n > 0);
  }
  wgmma_commit();
}

// Where a part of a tile of queries leaves: its place, and how many went through that before.
struct PlaceOfPart {
  int number;
  uint32_t count;
};

FC_DEVICE PlaceOfPart place_of_part(int part, uint32_t count) {
  if (NUM_PARTS == 2) return {part, count};
  return {stage_of<2>(count), count / 2};
}

// Of a part there is one for each thread that adds it: who skips a phase takes the one before for
// it.
FC_DEVICE SmemPtr<uint64_t> sums_full_of(const Barriers& bar, int part, uint32_t count) {
  return bar.sums_full + (part * ADDERS_OF_PART + stage_of<ADDERS_OF_PART>(count));
}

FC_DEVICE SmemPtr<float> sums_at(const Buffers& smem, int place) {
  return smem.dq + place * PLACE_FLOATS;
}

// Hands a part of tile number `count` over to the thread that adds it.
FC_DEVICE void hand_over_dq(const WmmaAccum (&dq)[DQ_FRAGS], const Buffers& smem,
                            const Barriers& bar, int part, uint32_t count) {
  const PlaceOfPart place = place_of_part(part, count);
  const auto own = sums_at(smem, place.number) + warp_idx() % 4 * DQ_FRAGS * SUMS_OF_FRAG;
  mbar_wait(bar.sums_empty + place.number, parity_of<1>(place.count) ^ 1);
#pragma unroll
  for (int d = 0; d < DQ_FRAGS; ++d) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* x = dq[d].x + half * 4;
      smem_store_packet(own + place_of_sums(d, half),
                        Packet<16>{{to_packet(x[0]).word[0], to_packet(x[1]).word[0],
                                    to_packet(x[2]).word[0], to_packet(x[3]).word[0]}});
    }
  }
  warp_sync();  // orders every lane's writes before the arrival
  arrive_for_warp(sums_full_of(bar, part, count));
}

// Until a consumer's part of the last tile has left shared memory; `count` tiles were walked over.
FC_DEVICE void await_dq_read(const Barriers& bar, int part, uint32_t count) {
  mbar_wait(bar.sums_empty + part, parity_of<1>(count) ^ 1);
}

// --- dQ on its way out ---------------------------------------------------------------------------

// Adds parts [first, end) of dQ of a query tile from row m_begin on, the tile number `count`, to a
// head's sums; if it is ORDERED, behind the `rank` blocks that add before. Those are waited for
// first: mostly that is over when dQ is there.
FC_DEVICE void add_parts_of_tile(const Buffers& smem, const Barriers& bar, int first, int end,
                                 uint32_t count, GmemPtr<float> sums, GmemPtr<int32_t> turns,
                                 int m_begin, int rank, int seqlen_q) {
  const int row = m_begin + (DQ_SHARED ? 0 : first * 64);  // the first of 64
  const auto turn = turns + row / 64;
  const bool has_rows = row < seqlen_q;
  if (ORDERED && has_rows) {
    gmem_await(turn, rank);
    fence_proxy_async_global();
  }
  for (int part = first; part < end; ++part) {
    mbar_wait(sums_full_of(bar, part, count), parity_of<ADDERS_OF_PART>(count));
    if (!has_rows) continue;
    fence_proxy_async();
    const int first_frag = DQ_SHARED ? part * DQ_FRAGS : 0;
    const int frags = min_i(QK_FRAGS - first_frag, DQ_FRAGS);
    const auto from = sums_at(smem, place_of_part(part, count).number);
    const auto to = sums + (int64_t(row / 64) * SUMS_OF_GROUP + first_frag * SUMS_OF_FRAG);
    // One where both are contiguous.
    constexpr int ADDS = DQ_FRAGS == QK_FRAGS ? 1 : 4;
#pragma unroll
    for (int warp = 0; warp < ADDS; ++warp) {
      const auto own_to = to + warp * SUMS_OF_WARP;
      const auto own_from = from + warp * DQ_FRAGS * SUMS_OF_FRAG;
      const int bytes = frags * SUMS_OF_FRAG * 4 * (4 / ADDS);
      if (ORDERED && rank == 0) {
        bulk_store(own_to, own_from, bytes);
      } else {
        bulk_add(own_to, own_from, bytes);
      }
    }
  }
  tma_store_commit();
  tma_store_wait_read<0>();
  for (int part = first; part < end; ++part) {
    mbar_arrive(bar.sums_empty + place_of_part(part, count).number);
  }
  if (ORDERED && has_rows) {
    tma_store_wait<0>();
    gmem_release_add(turn, 1);
  }
}

// One of the threads that add.
FC_DEVICE void add_parts(const AttnBwdSm90Params& params, const Barriers& bar, const Buffers& smem,
                         int adder) {
  constexpr bool TAKE_TURNS = ADDERS_OF_PART > 1;
  const AttnParams& p = params.attn;
  const int heads = opaque(p.num_heads_q / p.num_heads_kv);  // or ptxas divides at every tile
  uint32_t count = 0;
  for (int turn = 0;; ++turn) {
    const BlockCoord block = await_coord(bar, smem, turn);
    if (block.m_begin == NO_TILE) break;
    const Range tiles = query_tiles(p, block.m_begin);
    // Nobody may be a tile ahead: K and V of this one are there, so those of the last are released.
    mbar_wait(bar.kv_full, turn % 2);
    mbar_arrive(bar.kv_empty);
    for (int i = 0; i < tiles.end - tiles.begin; ++i) {
      const int m_begin = walked_tile(tiles, i) * BLOCK_M;
      const int rank = block.m_begin / BLOCK_N - key_tiles(p, m_begin).begin;
      for (int head = 0; head < heads; ++head, ++count) {
        if (TAKE_TURNS && stage_of<2>(count) != adder) continue;
        const auto sums = sums_of(params, block.batch_idx, block.head_idx + head, 0);
        const auto turns = turns_of(params, block.batch_idx, block.head_idx + head, 0);
        const int first = TAKE_TURNS ? 0 : adder;
        const int end = TAKE_TURNS ? NUM_PARTS : adder + 1;
        add_parts_of_tile(smem, bar, first, end, count, sums, turns, m_begin, rank, p.seqlen_q);
      }
    }
  }
}

// --- dQ shared by the consumers ------------------------------------------------------------------

// A consumer's part of dQ.
FC_DEVICE void issue_own_dq(WmmaAccum (&dq)[DQ_FRAGS], const Buffers& smem, int index,
                            uint32_t count) {
  issue_dq(dq, smem, 0, index * DQ_FRAGS, count);
}

// 64 keys of dK where a consumer's keys of dS lay, 64 columns in each of the buffers.
struct DkInDs {
  static constexpr int CHUNKS = QK_CHUNKS;
  static_assert(!ENDS_IN_PLACE || QK_CHUNKS * CHUNK <= NUM_DS_STAGES * 64, "room for dK");

  SmemPtr<Element> smem;  // the consumer's first key in the first buffer

  FC_DEVICE SmemPtr<Element> chunk(int c) const {
    return smem + (c * CHUNK / 64 * DsTile::ELEMENTS + c * CHUNK % 64 * 64);
  }

  FC_DEVICE SmemPtr<Element> at(int row, int col, int ahead) const {
    return chunk(col / CHUNK) +
           (row * CHUNK + swizzled_col<CHUNK_BYTES>(row, col % CHUNK + ahead));
  }
};

// --- dQ by a warpgroup of its own ----------------------------------------------------------------

FC_DEVICE void consume_ds(const AttnBwdSm90Params& params, const Barriers& bar,
                          const Buffers& smem) {
  const AttnParams& p = params.attn;
  WmmaAccum dq[DQ_FRAGS];
  uint32_t count = 0;
  for (int turn = 0;; ++turn) {
    const BlockCoord block = await_coord(bar, smem, turn);
    if (block.m_begin == NO_TILE) break;
    const Range tiles = query_tiles(p, block.m_begin);
    mbar_wait(bar.kv_full, turn % 2);
    for (int head = 0; head < p.num_heads_q / p.num_heads_kv; ++head) {
      for (int m_block = tiles.begin; m_block < tiles.end; ++m_block, ++count) {
        await_ds(bar, count);
#pragma unroll
        for (int group = 0; group < ROW_GROUPS; ++group) {
          issue_dq(dq, smem, group, 0, count);
          wgmma_wait<0>();
          wgmma_hold(dq);
          if (group == ROW_GROUPS - 1) {
            arrive_for_warp(bar.ds_empty + stage_of<NUM_DS_STAGES>(count));
          }
          hand_over_dq(dq, smem, bar, group, count);
        }
      }
    }
    warp_sync();  // lanes may still wait for kv_full, whose next phase must not pass them
    arrive_for_warp(bar.kv_empty);
  }
}
