// fwd_sm90/float8/float8_sm90.cuh - 8-bit caches: what TMA has loaded as bytes becomes tiles of
// 16-bit elements, as WGMMA reads them, by NUM_CONVERTERS warpgroups between producer and
// consumers.
//
// Half of their warps convert K and half V, each at its own pace. The tiles that are loaded ahead
// are bytes, so that as many keys are under way in half the memory; of converted ones two will do.
// Scales do not come into it: K's is part of softmax_scale, V's multiplies the output.
//
// Elements become float16, whatever q is: that is one instruction for two of them, and bfloat16
// would take three more. So Q is float16 as well, times a power of two that brings the largest
// element of a warp's rows near the end of float16's range. That loses 2^-40 of the largest
// product.
#pragma once

#include "prims_sm90.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"
#include "fwd_sm90/layout_sm90.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"

// Has the converting warps end, once they are done with the tiles before.
FC_DEVICE void end_conversion(const Barriers& bar, const Buffers& smem, const LoadState& k,
                              const LoadState& v) {
  mbar_wait(bar.k_load_empty + k.stage(), k.parity() ^ 1);
  smem_store(smem.ends + k.stage(), 1);
  mbar_arrive(bar.k_load_full + k.stage());
  mbar_wait(bar.v_load_empty + v.stage(), v.parity() ^ 1);
  smem_store(smem.ends + (LOAD_STAGES + v.stage()), 1);
  mbar_arrive(bar.v_load_full + v.stage());
}

// One ring of loads and the ring of tiles made from it, K's or V's.
template <class Load, class Tile>
struct Conversion {
  SmemPtr<uint64_t> load_full, load_empty, full, empty;
  Load bytes;
  Tile tiles;
  SmemPtr<int32_t> ends;
};

// A thread converts 8 elements at a time: neighbours in a row, so that neither the loads of a warp
// nor its stores, of 16 bytes each, meet in a bank.
constexpr int UNIT = 8;
constexpr int UNITS_OF_ROW = LOAD_CHUNK / UNIT;
constexpr int CONVERTING_THREADS = CONVERTING_WARPS * 32;
constexpr int UNITS_AT_ONCE = 8;  // whose loads wait for each other

// Converts a tile, this thread's part of it.
template <class Load, class Tile>
FC_DEVICE void convert_tile(Load bytes, Tile tile, int thread) {
  static_assert(!FLOAT8 || sizeof(CacheElement) == 1, "a unit is as many bytes");
  constexpr int UNITS = Load::ELEMENTS / UNIT;
  constexpr int UNITS_OF_CHUNK = BLOCK_N * UNITS_OF_ROW;
  const auto is_one = [&](int unit) { return UNITS % CONVERTING_THREADS == 0 || unit < UNITS; };
#pragma unroll
  for (int begin = 0; begin < UNITS; begin += UNITS_AT_ONCE * CONVERTING_THREADS) {
    Packet<UNIT> loaded[UNITS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < UNITS_AT_ONCE; ++i) {
      const int unit = begin + i * CONVERTING_THREADS + thread;
      if (begin + i * CONVERTING_THREADS >= UNITS || !is_one(unit)) continue;
      loaded[i] = smem_load_packet<UNIT>(bytes.smem + unit * UNIT);
    }
#pragma unroll
    for (int i = 0; i < UNITS_AT_ONCE; ++i) {
      const int unit = begin + i * CONVERTING_THREADS + thread;
      if (begin + i * CONVERTING_THREADS >= UNITS || !is_one(unit)) continue;
      const int row = unit % UNITS_OF_CHUNK / UNITS_OF_ROW;
      const int col = unit / UNITS_OF_CHUNK * LOAD_CHUNK + unit % UNITS_OF_ROW * UNIT;
      uint32_t low[2], high[2];
      widen4<MathElement>(loaded[i].word[0], low);
      widen4<MathElement>(loaded[i].word[1], high);
      const Packet<2 * UNIT> converted = {{low[0], low[1], high[0], high[1]}};
      smem_store_packet(tile.at(row, col), converted);
    }
  }
}

// Converts the tiles of a ring until its end.
template <class Load, class Tile>
FC_DEVICE void convert_ring(const Conversion<Load, Tile>& c, int thread) {
  LoadState load;
  PipelineState state;
  for (;; ++load.count, ++state.count) {
    mbar_wait(c.load_full + load.stage(), load.parity());
    if (smem_load(c.ends + load.stage()) != 0) return;
    mbar_wait(c.empty + state.stage(), state.parity() ^ 1);
    convert_tile(c.bytes[load.stage()], c.tiles[state.stage()], thread);
    fence_proxy_async();
    warp_sync();  // orders all lanes' accesses before the first one's arrivals
    if (lane_idx() == 0) {
      mbar_arrive(c.full + state.stage());
      mbar_arrive(c.load_empty + load.stage());
    }
  }
}

FC_DEVICE void convert_tiles(const Barriers& bar, const Buffers& smem) {
  const int warp = warp_idx() - 4 * (NUM_CONSUMERS + 1);
  const int thread = warp % CONVERTING_WARPS * 32 + lane_idx();
  if (warp < CONVERTING_WARPS) {
    convert_ring<KLoad, KTile>({bar.k_load_full, bar.k_load_empty, bar.k_full, bar.k_empty,
                                smem.k_loads, smem.k, smem.ends},
                               thread);
  } else {
    convert_ring<VLoad, VTile>({bar.v_load_full, bar.v_load_empty, bar.v_full, bar.v_empty,
                                smem.v_loads, smem.v, smem.ends + LOAD_STAGES},
                               thread);
  }
}

// A warp's 16 rows of Q as float16, each times a power of two. A product with one of a lane's two
// rows must be multiplied by its `inverse`, which all rows share, unless they `differ` so much that
// small ones would be lost.
struct Queries {
  WmmaA<MathElement> frag[Q_IN_REGISTERS ? Q_FRAGS : 1];
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
// Rows whose largest elements differ by more have a factor each. Up to here elements that are 2^-16
// of their row's largest keep the 8 bits that they have.
constexpr int MAX_DIFFERENCE = 12;

// Where a lane finds elements i and i + 1 of a fragment: Q's columns from `first_col` on.
FC_DEVICE SmemPtr<Element> query_pair(QGroup q, int first_col, int i) {
  const int lane = lane_idx();
  const int col = accum_col(lane, i);
  return q.at(warp_idx() % 4 * 16 + accum_row(lane, i), first_col, col) + col % 8;
}

// Finds what to multiply a lane's two rows of Q by.
FC_DEVICE void find_factors(Queries& queries, QGroup q, float (&factor)[2]) {
  float largest[2] = {0.0f, 0.0f};
#pragma unroll
  for (int d = 0; d < Q_FRAGS; ++d) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const uint32_t pair = smem_load_packet<4>(query_pair(q, d * 16, i)).word[0];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float element = abs_f(to_float(Element{uint16_t(pair >> j * 16)}));
        const float finite = element < -NEG_INF ? element : 0.0f;
        largest[row_of_element(i)] = max_f(largest[row_of_element(i)], finite);
      }
    }
  }
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

// Makes MathElements of a warpgroup's 64 rows of Q, in registers or where they lie. `barrier` is
// the warpgroup's own.
FC_DEVICE void load_queries(Queries& queries, QGroup q, int barrier) {
  constexpr bool IS_MULTIPLIED = !IS_FLOAT16<Element>;
  queries.differ = false;
  queries.inverse[0] = queries.inverse[1] = 1.0f;
  if (!Q_IN_REGISTERS && !IS_MULTIPLIED) return;
  float factor[2] = {1.0f, 1.0f};
  if (IS_MULTIPLIED) find_factors(queries, q, factor);
#pragma unroll
  for (int d = 0; d < Q_FRAGS; ++d) {
    WmmaAccum x;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const uint32_t pair = smem_load_packet<4>(query_pair(q, d * 16, i)).word[0];
      const float by = factor[row_of_element(i)];
      x.x[i] = to_float(Element{uint16_t(pair)}) * by;
      x.x[i + 1] = to_float(Element{uint16_t(pair >> 16)}) * by;
      if (!Q_IN_REGISTERS) {
        const Packet<4> converted = {{pack2<MathElement>(x.x[i], x.x[i + 1])}};
        smem_store_packet(query_pair(q, d * 16, i), converted);
      }
    }
    if (Q_IN_REGISTERS) wmma_accum_to_a(queries.frag[d], x);
  }
  if (Q_IN_REGISTERS) {
    warp_sync();  // orders all lanes' reads before the first one gives Q back
  } else {
    fence_proxy_async();
    named_barrier_sync(barrier, 128);  // hands all warps' rows on to products
  }
}

// Returns whether products are multiplied by `inverse` at once, and not as part of softmax_scale.
FC_DEVICE bool scales_products(const Queries& queries) {
  return SCORES_ARE_SCALED || queries.differ;
}

// Multiplies each element of a lane's two rows by the row's factor.
template <int NUM_FRAGS>
FC_DEVICE void scale_rows(WmmaAccum (&scores)[NUM_FRAGS], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < NUM_FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[n].x[i] *= factor[row_of_element(i)];
  }
}

template <int NUM_FRAGS>
FC_DEVICE void scale_products(WmmaAccum (&scores)[NUM_FRAGS], const Queries& queries) {
  if (scales_products(queries)) scale_rows(scores, queries.inverse);
}
