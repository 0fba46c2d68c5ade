// ptx/memory.cuh - pointers that know their memory space, and the loads and stores through them.
// A shared-memory pointer is the 32-bit shared-window address: half the registers of a generic
// pointer, and the form that ldmatrix, wmma.load and cp.async take.
#pragma once

extern __shared__ __align__(1024) unsigned char dynamic_smem[];

template <class T>
struct SmemPtr {
  uint32_t address;
};

template <class T>
FC_DEVICE SmemPtr<T> operator+(SmemPtr<T> p, int elements) {
  return {p.address + uint32_t(elements) * uint32_t(sizeof(T))};
}

// `count` elements of dynamic shared memory from `byte_offset`. Count and name serve the simulator.
template <class T>
FC_DEVICE SmemPtr<T> smem_view(int byte_offset, int /*count*/, const char* /*name*/) {
  return {uint32_t(__cvta_generic_to_shared(dynamic_smem)) + uint32_t(byte_offset)};
}

template <class T>
struct GmemPtr {
  T* address;
};

template <class T>
FC_DEVICE GmemPtr<T> operator+(GmemPtr<T> p, int64_t elements) {
  return {p.address + elements};
}

template <class T>
FC_DEVICE bool is_null(GmemPtr<T> p) {
  return p.address == nullptr;
}

// Bytes between the last multiple of BYTES and an address.
template <int BYTES, class T>
FC_DEVICE int misalignment(GmemPtr<T> p) {
  return int(reinterpret_cast<uint64_t>(p.address) % BYTES);
}

// BYTES moved by one instruction.
template <int BYTES>
struct alignas(BYTES < 4 ? 4 : BYTES) Packet {
  uint32_t word[BYTES < 4 ? 1 : BYTES / 4];
};

template <int BYTES, class T>
FC_DEVICE Packet<BYTES> smem_load_packet(SmemPtr<T> p) {
  Packet<BYTES> x;
  if constexpr (BYTES == 16) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "r"(p.address));
  } else if constexpr (BYTES == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(x.word[0]), "=r"(x.word[1])
                 : "r"(p.address));
  } else if constexpr (BYTES == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x.word[0]) : "r"(p.address));
  } else if constexpr (BYTES == 2) {
    uint16_t half;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(half) : "r"(p.address));
    x.word[0] = half;
  } else {
    static_assert(BYTES == 1, "a packet has 2, 4, 8 or 16 bytes, and one element may have 1");
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x.word[0]) : "r"(p.address));
  }
  return x;
}

template <class T, int BYTES>
FC_DEVICE void smem_store_packet(SmemPtr<T> p, Packet<BYTES> x) {
  if constexpr (BYTES == 16) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(p.address), "r"(x.word[0]),
                 "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
  } else if constexpr (BYTES == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(p.address), "r"(x.word[0]),
                 "r"(x.word[1])
                 : "memory");
  } else if constexpr (BYTES == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(p.address), "r"(x.word[0]) : "memory");
  } else if constexpr (BYTES == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(p.address), "h"(uint16_t(x.word[0]))
                 : "memory");
  } else {
    static_assert(BYTES == 1, "a packet has 2, 4, 8 or 16 bytes, and one element may have 1");
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(p.address), "r"(x.word[0]) : "memory");
  }
}

// The bits of a value of up to 4 bytes in a packet, and back.
template <class T>
FC_DEVICE Packet<sizeof(T)> to_packet(T x) {
  Packet<sizeof(T)> packet;
  if constexpr (sizeof(T) == 4) {
    packet.word[0] = *reinterpret_cast<uint32_t*>(&x);
  } else if constexpr (sizeof(T) == 1) {
    packet.word[0] = uint32_t(x);
  } else {
    packet.word[0] = *reinterpret_cast<uint16_t*>(&x);
  }
  return packet;
}

template <class T>
FC_DEVICE T from_packet(Packet<sizeof(T)> packet) {
  T x;
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<uint32_t*>(&x) = packet.word[0];
  } else if constexpr (sizeof(T) == 1) {
    x = T(packet.word[0]);
  } else {
    *reinterpret_cast<uint16_t*>(&x) = uint16_t(packet.word[0]);
  }
  return x;
}

template <class T>
FC_DEVICE T smem_load(SmemPtr<T> p) {
  return from_packet<T>(smem_load_packet<sizeof(T)>(p));
}

template <class T>
FC_DEVICE void smem_store(SmemPtr<T> p, T x) {
  smem_store_packet(p, to_packet(x));
}

template <class T>
FC_DEVICE T gmem_load(GmemPtr<const T> p) {
  return *p.address;
}

template <class T>
FC_DEVICE void gmem_store(GmemPtr<T> p, T x) {
  *p.address = x;
}

template <int BYTES, class T>
FC_DEVICE Packet<BYTES> gmem_load_packet(GmemPtr<const T> p) {
  if constexpr (BYTES == 2) {
    Packet<2> x;
    x.word[0] = *reinterpret_cast<const uint16_t*>(p.address);
    return x;
  } else {
    return *reinterpret_cast<const Packet<BYTES>*>(p.address);
  }
}

template <class T, int BYTES>
FC_DEVICE void gmem_store_packet(GmemPtr<T> p, Packet<BYTES> x) {
  if constexpr (BYTES == 2) {
    *reinterpret_cast<uint16_t*>(p.address) = uint16_t(x.word[0]);
  } else {
    *reinterpret_cast<Packet<BYTES>*>(p.address) = x;
  }
}
