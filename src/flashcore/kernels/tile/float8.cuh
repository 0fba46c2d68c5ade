// tile/float8.cuh - 8-bit caches: what TMA has loaded as bytes becomes tiles of 16-bit
// elements, as WGMMA reads them, by a warpgroup that stands between the producer and the consumers.
//
// Two of its warps convert K and two V, each pair at its own pace; where consumers share the keys,
// each ring has a warp. The tiles that are loaded ahead are bytes, so that as many keys are under
// way in half the memory; of converted ones two will do. Scales do not come into it: K's is part of
// softmax_scale, V's multiplies the output.
//
// Elements become float16, whatever q is, where Q fits into registers: that is one instruction for
// two of them, and bfloat16 would take three more. So Q is float16 as well, times a power of two
// that brings the largest element of a warp's rows near the end of float16's range. What is lost by
// that is 2^-40 of the largest product.
#pragma once

// Has the converting warps end, once they are done with the tiles before.
FC_DEVICE void end_conversion(const Barriers& bar, const Buffers& smem,
                              const LoadState (&k_states)[KEY_SLICES],
                              const LoadState (&v_states)[KEY_SLICES]) {
  for (int s = 0; s < KEY_SLICES; ++s) {
    const LoadState k = k_states[s], v = v_states[s];
    mbar_wait(bar.k_load_empty + k.stage(), k.parity() ^ 1);
    smem_store(smem.ends + k.stage(), 1);
    mbar_arrive(bar.k_load_full + k.stage());
    mbar_wait(bar.v_load_empty + v.stage(), v.parity() ^ 1);
    smem_store(smem.ends + (LOAD_STAGES + v.stage()), 1);
    mbar_arrive(bar.v_load_full + v.stage());
  }
}

// One ring of loads and the ring of tiles made from it, K's or V's.
struct Conversion {
  SmemPtr<uint64_t> load_full, load_empty, full, empty;
  SmemPtr<CacheElement> bytes;
  SmemPtr<MathElement> tiles;
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
FC_DEVICE void convert_tile(SmemPtr<CacheElement> bytes, SmemPtr<MathElement> tile, int thread) {
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
      widen4<MathElement>(loaded[i].word[0], low);
      widen4<MathElement>(loaded[i].word[1], high);
      const int place = col / CHUNK * (BLOCK_N * CHUNK) + row * CHUNK +
                        swizzled_col<CHUNK_BYTES>(row, col % CHUNK);
      smem_store_packet(tile + place, Packet<2 * UNIT>{{low[0], low[1], high[0], high[1]}});
    }
  }
}

// Converts the tiles of a ring until its end.
template <int ELEMENTS>
FC_DEVICE void convert_ring(const Conversion& c, int ring, int thread) {
  LoadState load = {ring};
  PipelineState state = {ring};
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
  const int ring = warp_idx() % 4 / CONVERTING_WARPS;  // K's, then V's
  if (ring < KEY_SLICES) {
    convert_ring<K_ELEMENTS>({bar.k_load_full, bar.k_load_empty, bar.k_full, bar.k_empty,
                              smem.k_loads, smem.k, smem.ends},
                             ring, thread);
  } else {
    convert_ring<V_ELEMENTS>({bar.v_load_full, bar.v_load_empty, bar.v_full, bar.v_empty,
                              smem.v_loads, smem.v, smem.ends + LOAD_STAGES},
                             ring - KEY_SLICES, thread);
  }
}

// A warp's 16 rows of Q as operands in registers. `inverse` of each of a lane's two rows is what a
// product with it must be multiplied by; it is one for all rows, unless they `differ` so much that
// small ones would be lost.
struct Queries {
  WmmaA<MathElement> frag[Q_FRAGS];
  float inverse[2];
  bool differ;
};

FC_DEVICE float power_of_two(int exponent) {
  return from_packet<float>(Packet<4>{{uint32_t(exponent + 127) << 23}});
}

// The exponent of x, as far as power_of_two has that of a scale and of its inverse.
FC_DEVICE int exponent_of(float x) {
  return max_i(int(to_packet(x).word[0] >> 23 & 0xff), 15) - 127;
}

// Where the largest element goes: 2^14 to 2^15, of float16's 2^16.
constexpr int LARGEST_EXPONENT = 14;
// Rows whose largest elements differ by more have a factor each: below it, 13 bits are left of the
// smaller ones' elements that are 2^-13 of their row's largest.
constexpr int MAX_DIFFERENCE = 12;

FC_DEVICE void load_queries(Queries& queries, SmemPtr<Element> q_smem) {
  WmmaAccum x[Q_FRAGS];
  float largest[2] = {0.0f, 0.0f};
  const int first_row = warp_idx() % 4 * 16;
#pragma unroll
  for (int d = 0; d < Q_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int row = first_row + accum_row(lane_idx(), i);
      const int col = d * 16 % CHUNK + accum_col(lane_idx(), i);
      const auto chunk = q_smem + d * 16 / CHUNK * (64 * CHUNK);
      const auto from = chunk + (row * CHUNK + swizzled_col<CHUNK_BYTES>(row, col) + col % 8);
      const uint32_t pair = smem_load_packet<4>(from).word[0];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float element = to_float(Element{uint16_t(pair >> j * 16)});
        x[d].x[i + j] = element;
        const float magnitude = abs_f(element) < -NEG_INF ? abs_f(element) : 0.0f;
        largest[row_of_element(i)] = max_f(largest[row_of_element(i)], magnitude);
      }
    }
  }
  queries.differ = false;
  queries.inverse[0] = queries.inverse[1] = 1.0f;
  float factor[2] = {1.0f, 1.0f};
  if constexpr (!IS_FLOAT16<Element>) {
    float most = max_f(largest[0], largest[1]);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) most = max_f(most, shfl_xor(most, lanes));
    const int of_warp = exponent_of(most);
    int of_row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float of_quad = quad_max(largest[r]);
      of_row[r] = of_quad == 0.0f ? of_warp : exponent_of(of_quad);
    }
    queries.differ = warp_any(of_warp - min_i(of_row[0], of_row[1]) > MAX_DIFFERENCE);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int exponent = queries.differ ? of_row[r] : of_warp;
      factor[r] = power_of_two(LARGEST_EXPONENT - exponent);
      queries.inverse[r] = power_of_two(exponent - LARGEST_EXPONENT);
    }
  }
#pragma unroll
  for (int d = 0; d < Q_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[d].x[i] *= factor[row_of_element(i)];
    wmma_accum_to_a(queries.frag[d], x[d]);
  }
}

// Whether products are multiplied as they come, and not with softmax_scale.
FC_DEVICE bool scales_products(const Queries& queries) {
  return SCORES_ARE_SCALED || queries.differ;
}

FC_DEVICE void scale_products(WmmaAccum (&scores)[KEY_FRAGS], const Queries& queries) {
  if (!scales_products(queries)) return;
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[n].x[i] *= queries.inverse[row_of_element(i)];
  }
}
