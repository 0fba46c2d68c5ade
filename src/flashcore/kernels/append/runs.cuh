// append/runs.cuh - what a thread moves at once of one head: two runs of N elements, and their
// angles. With N = 8 a run is read as a packet of 16 bytes, with N = 1 it is an element.
#pragma once

#include "prims.cuh"
#include "append/quantise.cuh"

// Two runs of a head, by their first elements. Those that turn are pairs, element by element, or
// where neighbours turn (INTERLEAVED) both runs are one, of pairs side by side. A run that the head
// does not have is one that it has, which may be read.
struct Place {
  int first, second;
  bool turns, has_first, has_second;
};

template <int N>
FC_DEVICE Place place_of(int unit, int half, int dim) {
  const bool turns = unit * N < half;
  const bool are_apart = turns && !INTERLEAVED;
  const int first = are_apart ? unit * N : 2 * unit * N;
  const int second = first + (are_apart ? half : N);
  const bool has_first = first < dim;
  const bool has_second = second < dim;
  return {has_first ? first : 0, has_second ? second : 0, turns, has_first, has_second};
}

// N elements of 2 or 4 bytes as words, which are taken apart where they are needed: doing so waits
// for them.
template <class T, int N>
struct Run {
  static constexpr int IN_WORD = N == 1 ? 1 : 4 / int(sizeof(T));
  uint32_t word[N / IN_WORD];

  FC_DEVICE void load(GmemPtr<const T> from) {
    if constexpr (N == 1) {
      word[0] = to_packet(gmem_load(from)).word[0];
    } else {
#pragma unroll
      for (int w = 0; w < N / IN_WORD; w += 4) {
        const Packet<16> packet = gmem_load_packet<16>(from + w * IN_WORD);
#pragma unroll
        for (int i = 0; i < 4; ++i) word[w + i] = packet.word[i];
      }
    }
  }

  FC_DEVICE float at(int i) const {
    const uint32_t bits = word[i / IN_WORD];
    if constexpr (sizeof(T) == 4) {
      return from_packet<float>(Packet<4>{{bits}});
    } else {
      return to_float(T{uint16_t(i % IN_WORD == 0 ? bits : bits >> 16)});
    }
  }
};

// Stores N elements of T; each word holds as many of them as fit.
template <int N, class T>
FC_DEVICE void store_run(GmemPtr<T> to, const uint32_t* word) {
  if constexpr (N == 1) {
    gmem_store(to, T{decltype(T::bits)(word[0])});
  } else {
    Packet<N * int(sizeof(T))> packet;
#pragma unroll
    for (int w = 0; w < N * int(sizeof(T)) / 4; ++w) packet.word[w] = word[w];
    gmem_store_packet(to, packet);
  }
}

// A run as elements of a tensor of T: those of 8 bits count times a scale.
template <class T, int N>
FC_DEVICE void store_as(GmemPtr<T> to, const Run<Element, N>& run, float scale) {
  if constexpr (sizeof(T) == 1) {
    const Divisor divisor = divisor_of(scale);
    uint32_t word[(N + 3) / 4] = {};
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      word[i / 4] |= quantised2(run.at(i), N > 1 ? run.at(i + 1) : 0.0f, divisor) << (i % 4 * 8);
    }
    store_run<N>(to, word);
  } else {
    store_run<N>(to, run.word);
  }
}

template <int N>
struct Runs {
  Run<Element, N> first, second;

  // `col`: from one element of the head to the next; 1 where N is not 1.
  FC_DEVICE void load(GmemPtr<const Element> head, int64_t col, const Place& at) {
    const int64_t step = N == 1 ? col : 1;
    first.load(head + at.first * step);
    second.load(head + at.second * step);
  }

  template <class T>
  FC_DEVICE void store(GmemPtr<T> head, int64_t col, const Place& at, float scale) const {
    const int64_t step = N == 1 ? col : 1;
    if (at.has_first) store_as(head + at.first * step, first, scale);
    if (at.has_second) store_as(head + at.second * step, second, scale);
  }
};

template <int N>
struct Angles {
  Run<RotaryElement, N> cos, sin;
};

// a * b, rounded: written as an instruction that adds -0, it cannot become one with a later
// addition, which would round only once. The -0 is hidden, or the compiler would undo that.
FC_DEVICE float product(float a, float b, float minus_zero) { return fma_rn(a, b, minus_zero); }

template <int N>
FC_DEVICE void turn(Runs<N>& runs, const Angles<N>& angles) {
  const auto zero = from_packet<float>(Packet<4>{{uint32_t(opaque(int(0x80000000u)))}});
  float turned[2 * N];  // of the first run, then of the second
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int first = INTERLEAVED ? 2 * i : i;
    const int second = INTERLEAVED ? 2 * i + 1 : i + N;
    const float a = first < N ? runs.first.at(first) : runs.second.at(first - N);
    const float b = second < N ? runs.first.at(second) : runs.second.at(second - N);
    const float c = angles.cos.at(i);
    const float s = angles.sin.at(i);
    turned[first] = product(a, c, zero) - product(b, s, zero);
    turned[second] = product(a, s, zero) + product(b, c, zero);
  }
#pragma unroll
  for (int i = 0; i < 2 * N; i += 2) {
    const uint32_t both = pack2<Element>(turned[i], turned[i + 1]);
    if constexpr (N == 1) {
      runs.first.word[0] = both & 0xffffu;
      runs.second.word[0] = both >> 16;
    } else if (i < N) {
      runs.first.word[i / 2] = both;
    } else {
      runs.second.word[(i - N) / 2] = both;
    }
  }
}
