// fwd_sm90/float8_sm90.cuh - 8-bit caches: what TMA has loaded as bytes becomes tiles of 16-bit
// elements, as WGMMA reads them, by a warpgroup that stands between the producer and the consumers.
//
// Two of its warps convert K and two V, each pair at its own pace. The tiles that are loaded ahead
// are bytes, so that as many keys are under way in half the memory; of converted ones two will do.
// Scales do not come into it: K's is part of softmax_scale, V's multiplies the output.
#pragma once

// Has the converting warps end, once they are done with the tiles before.
FC_DEVICE void end_conversion(const Barriers& bar, const Buffers& smem, const LoadState& k_state,
                              const LoadState& v_state) {
  mbar_wait(bar.k_load_empty + k_state.stage(), k_state.parity() ^ 1);
  smem_store(smem.ends + k_state.stage(), 1);
  mbar_arrive(bar.k_load_full + k_state.stage());
  mbar_wait(bar.v_load_empty + v_state.stage(), v_state.parity() ^ 1);
  smem_store(smem.ends + (LOAD_STAGES + v_state.stage()), 1);
  mbar_arrive(bar.v_load_full + v_state.stage());
}

// One ring of loads and the ring of tiles made from it, K's or V's.
struct Conversion {
  SmemPtr<uint64_t> load_full, load_empty, full, empty;
  SmemPtr<CacheElement> bytes;
  SmemPtr<Element> tiles;
  SmemPtr<int32_t> ends;
};

// A thread converts 8 elements at a time: neighbours in a row, so that neither the loads of a warp
// nor its stores, of 16 bytes each, meet in a bank.
constexpr int UNIT = 8;
constexpr int UNITS_OF_ROW = LOAD_CHUNK / UNIT;
constexpr int CONVERTING_THREADS = CONVERTING_WARPS * 32;
constexpr int UNITS_AT_ONCE = 8;  // whose loads wait for each other

// Converts a tile of so many elements, this thread's part of it.
template <int ELEMENTS>
FC_DEVICE void convert_tile(SmemPtr<CacheElement> bytes, SmemPtr<Element> tile, int thread) {
  static_assert(!FLOAT8 || sizeof(CacheElement) == 1, "a unit is as many bytes");
  constexpr int UNITS = ELEMENTS / UNIT / CONVERTING_THREADS;  // of a thread
  constexpr int UNITS_OF_CHUNK = BLOCK_N * UNITS_OF_ROW;
  static_assert(ELEMENTS % (UNIT * CONVERTING_THREADS) == 0, "each thread has as many");
#pragma unroll
  for (int begin = 0; begin < UNITS; begin += UNITS_AT_ONCE) {
    Packet<UNIT> loaded[UNITS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < UNITS_AT_ONCE; ++i) {
      if (begin + i >= UNITS) continue;
      loaded[i] =
          smem_load_packet<UNIT>(bytes + ((begin + i) * CONVERTING_THREADS + thread) * UNIT);
    }
#pragma unroll
    for (int i = 0; i < UNITS_AT_ONCE; ++i) {
      if (begin + i >= UNITS) continue;
      const int unit = (begin + i) * CONVERTING_THREADS + thread;
      const int row = unit % UNITS_OF_CHUNK / UNITS_OF_ROW;
      const int col = unit / UNITS_OF_CHUNK * LOAD_CHUNK + unit % UNITS_OF_ROW * UNIT;
      uint32_t low[2], high[2];
      widen4<Element>(loaded[i].word[0], low);
      widen4<Element>(loaded[i].word[1], high);
      const int place = col / CHUNK * (BLOCK_N * CHUNK) + row * CHUNK +
                        swizzled_col<CHUNK_BYTES>(row, col % CHUNK);
      smem_store_packet(tile + place, Packet<2 * UNIT>{{low[0], low[1], high[0], high[1]}});
    }
  }
}

// Converts the tiles of a ring until its end.
template <int ELEMENTS>
FC_DEVICE void convert_ring(const Conversion& c, int thread) {
  LoadState load;
  PipelineState state;
  for (;; ++load.count, ++state.count) {
    mbar_wait(c.load_full + load.stage(), load.parity());
    if (smem_load(c.ends + load.stage()) != 0) return;
    mbar_wait(c.empty + state.stage(), state.parity() ^ 1);
    convert_tile<ELEMENTS>(c.bytes + load.stage() * ELEMENTS, c.tiles + state.stage() * ELEMENTS,
                           thread);
    fence_proxy_async();
    warp_sync();  // orders all lanes' accesses before the first one's arrivals
    if (lane_idx() == 0) {
      mbar_arrive(c.full + state.stage());
      mbar_arrive(c.load_empty + load.stage());
    }
  }
}

FC_DEVICE void convert_tiles(const Barriers& bar, const Buffers& smem) {
  const int thread = thread_idx() % CONVERTING_THREADS;
  if (warp_idx() % 4 < CONVERTING_WARPS) {
    convert_ring<K_ELEMENTS>({bar.k_load_full, bar.k_load_empty, bar.k_full, bar.k_empty,
                              smem.k_loads, smem.k, smem.ends},
                             thread);
  } else {
    convert_ring<V_ELEMENTS>({bar.v_load_full, bar.v_load_empty, bar.v_full, bar.v_empty,
                              smem.v_loads, smem.v, smem.ends + LOAD_STAGES},
                             thread);
  }
}
