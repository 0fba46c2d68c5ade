// host/memory.cuh - bounded pointers. A shared-memory pointer knows its view; a global pointer is 8
// bytes, as on the device, and holds a simulated address whose tensor the runtime looks up.
#pragma once

#include "host/types.cuh"

template <class T>
struct SmemPtr {
  const char* name;
  int32_t base;   // of the view, in bytes
  int32_t count;  // of the view, in elements
  int32_t index;  // may leave [0, count) as long as it is not accessed there

  fc_host::SmemRef ref() const { return {name, base, count, index, int32_t(sizeof(T))}; }
};

template <class T>
FC_DEVICE SmemPtr<T> operator+(SmemPtr<T> p, int elements) {
  return {p.name, p.base, p.count, p.index + elements};
}

// `count` elements of dynamic shared memory from `byte_offset`.
template <class T>
FC_DEVICE SmemPtr<T> smem_view(int byte_offset, int count, const char* name, FC_SITE) {
  fc_host::check_view(name, byte_offset, count, int(sizeof(T)), FC_HERE);
  return {name, byte_offset, count, 0};
}

template <class T>
struct GmemPtr {
  uint64_t address;
};

template <class T>
FC_DEVICE GmemPtr<T> operator+(GmemPtr<T> p, int64_t elements) {
  return {p.address + uint64_t(elements) * sizeof(T)};
}

template <class T>
FC_DEVICE bool is_null(GmemPtr<T> p) {
  return p.address == 0;
}

// Bytes between the last multiple of BYTES and an address.
template <int BYTES, class T>
FC_DEVICE int misalignment(GmemPtr<T> p) {
  return int(p.address % BYTES);
}

// BYTES moved by one instruction.
template <int BYTES>
struct alignas(BYTES < 4 ? 4 : BYTES) Packet {
  static_assert(BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16,
                "a packet has 2, 4, 8 or 16 bytes");
  uint32_t word[BYTES < 4 ? 1 : BYTES / 4];
};

// The bits of a 2- or 4-byte value in a packet, and back.
template <class T>
FC_DEVICE Packet<int(sizeof(T))> to_packet(T x) {
  Packet<int(sizeof(T))> packet = {};
  std::memcpy(packet.word, &x, sizeof(T));
  return packet;
}

template <class T>
FC_DEVICE T from_packet(Packet<int(sizeof(T))> packet) {
  T x;
  std::memcpy(&x, packet.word, sizeof(T));
  return x;
}

template <int BYTES, class T>
FC_DEVICE Packet<BYTES> smem_load_packet(SmemPtr<T> p, FC_SITE) {
  Packet<BYTES> x = {};
  std::memcpy(x.word, fc_host::smem_read(p.ref(), BYTES, FC_HERE), BYTES);
  return x;
}

template <class T, int BYTES>
FC_DEVICE void smem_store_packet(SmemPtr<T> p, Packet<BYTES> x, FC_SITE) {
  std::memcpy(fc_host::smem_write(p.ref(), BYTES, FC_HERE), x.word, BYTES);
}

template <class T>
FC_DEVICE T smem_load(SmemPtr<T> p, FC_SITE) {
  T x;
  std::memcpy(&x, fc_host::smem_read(p.ref(), int(sizeof(T)), FC_HERE), sizeof(T));
  return x;
}

template <class T>
FC_DEVICE void smem_store(SmemPtr<T> p, T x, FC_SITE) {
  std::memcpy(fc_host::smem_write(p.ref(), int(sizeof(T)), FC_HERE), &x, sizeof(T));
}

template <class T>
FC_DEVICE T gmem_load(GmemPtr<const T> p, FC_SITE) {
  T x;
  std::memcpy(&x, fc_host::gmem_read(p.address, int(sizeof(T)), FC_HERE), sizeof(T));
  return x;
}

template <class T>
FC_DEVICE void gmem_store(GmemPtr<T> p, T x, FC_SITE) {
  std::memcpy(fc_host::gmem_write(p.address, int(sizeof(T)), FC_HERE), &x, sizeof(T));
}

template <int BYTES, class T>
FC_DEVICE Packet<BYTES> gmem_load_packet(GmemPtr<const T> p, FC_SITE) {
  Packet<BYTES> x = {};
  std::memcpy(x.word, fc_host::gmem_read(p.address, BYTES, FC_HERE), BYTES);
  return x;
}

template <class T, int BYTES>
FC_DEVICE void gmem_store_packet(GmemPtr<T> p, Packet<BYTES> x, FC_SITE) {
  std::memcpy(fc_host::gmem_write(p.address, BYTES, FC_HERE), x.word, BYTES);
}
