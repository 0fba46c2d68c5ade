// ptx/wgmma.cuh - asynchronous 64 x N x 16 matrix products of a warpgroup (PTX ISA:
// wgmma.mma_async).
//
// N is 16 times the number of accumulator fragments. A fragment is wmma.cuh's: the accumulator of
// m64nNk16 gives warp w rows 16 w..16 w + 15, and 16 columns at a time lie in a lane as WmmaAccum
// does; the A operand from registers is WmmaA.
#pragma once

// Descriptor of an operand tile in shared memory, swizzled in rows of ROW_BYTES as TMA writes it
// (PTX ISA: matrix descriptor). Eight rows make one swizzle pattern, and `pattern_bytes` further on
// are the next eight; `leading_bytes` separates the column chunks of an MN-major operand and is not
// read for a K-major one.
struct WgmmaDesc {
  uint32_t low;   // address / 16, and leading_bytes / 16 from bit 16
  uint32_t high;  // pattern_bytes / 16, and the swizzle mode in the top bits
};

template <int ROW_BYTES, class T>
FC_DEVICE WgmmaDesc wgmma_desc(SmemPtr<T> p, int leading_bytes,
                               int pattern_bytes = 8 * ROW_BYTES) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "swizzle patterns of 64 or 128 bytes");
  const uint32_t swizzle = ROW_BYTES == 128 ? 1 : 2;
  return {(p.address & 0x3ffff) >> 4 | uint32_t(leading_bytes >> 4) << 16,
          uint32_t(pattern_bytes >> 4) | swizzle << 30};
}

FC_DEVICE uint64_t wgmma_bits(WgmmaDesc desc) { return uint64_t(desc.high) << 32 | desc.low; }

// The same operand `bytes` further on.
FC_DEVICE WgmmaDesc operator+(WgmmaDesc desc, int bytes) {
  return {desc.low + uint32_t(bytes >> 4), desc.high};
}

// Where TMA, or whoever writes in its stead, puts column `col` (a multiple of 8, of 16-bit
// elements) of a row: 16-byte units are permuted within the pattern of eight rows.
template <int ROW_BYTES>
FC_DEVICE int swizzled_col(int row, int col) {
  const int unit = ROW_BYTES == 128 ? col / 8 ^ row % 8 : col / 8 ^ row / 2 % 4;
  return unit * 8;
}

FC_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FC_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
FC_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler sees accumulators written where wgmma is issued. This ties them to a place, so that
// no use of them is moved up across the wait before it.
template <int FRAGS>
FC_DEVICE void wgmma_hold(WmmaAccum (&d)[FRAGS]) {
#pragma unroll
  for (int n = 0; n < FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("" : "+f"(d[n].x[i])::"memory");
  }
}

// Operands that have been computed by here: the compiler moves nothing of that further down.
template <class T, int FRAGS>
FC_DEVICE void wgmma_hold(WmmaA<T> (&a)[FRAGS]) {
#pragma unroll
  for (int n = 0; n < FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[n].reg[i])::"memory");
  }
}

// Eight accumulator registers: as operands, and their names in the instruction.
#define FC_ACC(n)                                                                                  \
  "+f"(d[n].x[0]), "+f"(d[n].x[1]), "+f"(d[n].x[2]), "+f"(d[n].x[3]), "+f"(d[n].x[4]),             \
      "+f"(d[n].x[5]), "+f"(d[n].x[6]), "+f"(d[n].x[7])
#define FC_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FC_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FC_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FC_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FC_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FC_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FC_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FC_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FC_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FC_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FC_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FC_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FC_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FC_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FC_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FC_R15 "%120, %121, %122, %123, %124, %125, %126, %127"

// The first n fragments.
#define FC_ACC_1 FC_ACC(0)
#define FC_RS_1 FC_R0
#define FC_ACC_2 FC_ACC_1, FC_ACC(1)
#define FC_RS_2 FC_RS_1 ", " FC_R1
#define FC_ACC_3 FC_ACC_2, FC_ACC(2)
#define FC_RS_3 FC_RS_2 ", " FC_R2
#define FC_ACC_4 FC_ACC_3, FC_ACC(3)
#define FC_RS_4 FC_RS_3 ", " FC_R3
#define FC_ACC_5 FC_ACC_4, FC_ACC(4)
#define FC_RS_5 FC_RS_4 ", " FC_R4
#define FC_ACC_6 FC_ACC_5, FC_ACC(5)
#define FC_RS_6 FC_RS_5 ", " FC_R5
#define FC_ACC_7 FC_ACC_6, FC_ACC(6)
#define FC_RS_7 FC_RS_6 ", " FC_R6
#define FC_ACC_8 FC_ACC_7, FC_ACC(7)
#define FC_RS_8 FC_RS_7 ", " FC_R7
#define FC_ACC_9 FC_ACC_8, FC_ACC(8)
#define FC_RS_9 FC_RS_8 ", " FC_R8
#define FC_ACC_10 FC_ACC_9, FC_ACC(9)
#define FC_RS_10 FC_RS_9 ", " FC_R9
#define FC_ACC_11 FC_ACC_10, FC_ACC(10)
#define FC_RS_11 FC_RS_10 ", " FC_R10
#define FC_ACC_12 FC_ACC_11, FC_ACC(11)
#define FC_RS_12 FC_RS_11 ", " FC_R11
#define FC_ACC_13 FC_ACC_12, FC_ACC(12)
#define FC_RS_13 FC_RS_12 ", " FC_R12
#define FC_ACC_14 FC_ACC_13, FC_ACC(13)
#define FC_RS_14 FC_RS_13 ", " FC_R13
#define FC_ACC_15 FC_ACC_14, FC_ACC(14)
#define FC_RS_15 FC_RS_14 ", " FC_R14
#define FC_ACC_16 FC_ACC_15, FC_ACC(15)
#define FC_RS_16 FC_RS_15 ", " FC_R15

// `c` is the number of the first operand behind the accumulators.
#define FC_WGMMA_SS(frags, n, types, c0, c1, c2, mn_major)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " c2 ", 0;\n"                                     \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." types " {" FC_RS_##frags "}, " c0  \
               ", " c1 ", p, 1, 1, " mn_major ";\n}\n"                                             \
               : FC_ACC_##frags                                                                    \
               : "l"(wgmma_bits(a_desc)),                                                          \
                 "l"(wgmma_bits(b_desc)), "r"(int(accumulate)))

#define FC_WGMMA_RS(frags, n, types, c0, c1, c2, c3, c4, c5, mn_major)                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " c5 ", 0;\n"                                     \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." types " {" FC_RS_##frags "}, {" c0 \
               ", " c1 ", " c2 ", " c3 "}, " c4 ", p, 1, 1, " mn_major ";\n}\n"                    \
               : FC_ACC_##frags                                                                    \
               : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]),                       \
                 "l"(wgmma_bits(b_desc)), "r"(int(accumulate)))

// A and B in shared memory, contiguous along k or, MN_MAJOR, along m and n.
template <class T, bool MN_MAJOR, int FRAGS>
FC_DEVICE void wgmma_of_smem(WmmaAccum (&d)[FRAGS], WgmmaDesc a_desc, WgmmaDesc b_desc,
                             bool accumulate) {
#define FC_CASE(frags, n, c0, c1, c2)                                                              \
  if constexpr (FRAGS == frags) {                                                                  \
    if constexpr (IS_FLOAT16<T> && MN_MAJOR) {                                                     \
      FC_WGMMA_SS(frags, n, "f16.f16", c0, c1, c2, "1, 1");                                        \
    } else if constexpr (IS_FLOAT16<T>) {                                                          \
      FC_WGMMA_SS(frags, n, "f16.f16", c0, c1, c2, "0, 0");                                        \
    } else if constexpr (MN_MAJOR) {                                                               \
      FC_WGMMA_SS(frags, n, "bf16.bf16", c0, c1, c2, "1, 1");                                      \
    } else {                                                                                       \
      FC_WGMMA_SS(frags, n, "bf16.bf16", c0, c1, c2, "0, 0");                                      \
    }                                                                                              \
  } else
  FC_CASE(1, "16", "%8", "%9", "%10")
  FC_CASE(2, "32", "%16", "%17", "%18")
  FC_CASE(3, "48", "%24", "%25", "%26")
  FC_CASE(4, "64", "%32", "%33", "%34")
  FC_CASE(5, "80", "%40", "%41", "%42")
  FC_CASE(6, "96", "%48", "%49", "%50")
  FC_CASE(7, "112", "%56", "%57", "%58")
  FC_CASE(8, "128", "%64", "%65", "%66")
  FC_CASE(9, "144", "%72", "%73", "%74")
  FC_CASE(10, "160", "%80", "%81", "%82")
  FC_CASE(11, "176", "%88", "%89", "%90")
  FC_CASE(12, "192", "%96", "%97", "%98")
  FC_CASE(13, "208", "%104", "%105", "%106")
  FC_CASE(14, "224", "%112", "%113", "%114")
  FC_CASE(15, "240", "%120", "%121", "%122")
  FC_CASE(16, "256", "%128", "%129", "%130")
  { static_assert(FRAGS < 0, "N is 16, 32, .. or 256"); }
#undef FC_CASE
}

// d = A B^T (+ d): A 64 x 16 and B N x 16 in shared memory, both contiguous along k.
template <class T, int FRAGS>
FC_DEVICE void wgmma_ss(WmmaAccum (&d)[FRAGS], WgmmaDesc a_desc, WgmmaDesc b_desc,
                        bool accumulate) {
  wgmma_of_smem<T, false>(d, a_desc, b_desc, accumulate);
}

// d = A^T B (+ d): A 16 x 64 and B 16 x N in shared memory, contiguous along m and n.
template <class T, int FRAGS>
FC_DEVICE void wgmma_ss_mn(WmmaAccum (&d)[FRAGS], WgmmaDesc a_desc, WgmmaDesc b_desc,
                           bool accumulate) {
  wgmma_of_smem<T, true>(d, a_desc, b_desc, accumulate);
}

// A in registers, B in shared memory, contiguous along k, or, MN_MAJOR, along n.
template <class T, bool MN_MAJOR, int FRAGS>
FC_DEVICE void wgmma_of_registers(WmmaAccum (&d)[FRAGS], const WmmaA<T>& a, WgmmaDesc b_desc,
                                  bool accumulate) {
#define FC_CASE(frags, n, c0, c1, c2, c3, c4, c5)                                                  \
  if constexpr (FRAGS == frags) {                                                                  \
    if constexpr (IS_FLOAT16<T> && MN_MAJOR) {                                                     \
      FC_WGMMA_RS(frags, n, "f16.f16", c0, c1, c2, c3, c4, c5, "1");                               \
    } else if constexpr (IS_FLOAT16<T>) {                                                          \
      FC_WGMMA_RS(frags, n, "f16.f16", c0, c1, c2, c3, c4, c5, "0");                               \
    } else if constexpr (MN_MAJOR) {                                                               \
      FC_WGMMA_RS(frags, n, "bf16.bf16", c0, c1, c2, c3, c4, c5, "1");                             \
    } else {                                                                                       \
      FC_WGMMA_RS(frags, n, "bf16.bf16", c0, c1, c2, c3, c4, c5, "0");                             \
    }                                                                                              \
  } else
  FC_CASE(1, "16", "%8", "%9", "%10", "%11", "%12", "%13")
  FC_CASE(2, "32", "%16", "%17", "%18", "%19", "%20", "%21")
  FC_CASE(3, "48", "%24", "%25", "%26", "%27", "%28", "%29")
  FC_CASE(4, "64", "%32", "%33", "%34", "%35", "%36", "%37")
  FC_CASE(5, "80", "%40", "%41", "%42", "%43", "%44", "%45")
  FC_CASE(6, "96", "%48", "%49", "%50", "%51", "%52", "%53")
  FC_CASE(7, "112", "%56", "%57", "%58", "%59", "%60", "%61")
  FC_CASE(8, "128", "%64", "%65", "%66", "%67", "%68", "%69")
  FC_CASE(9, "144", "%72", "%73", "%74", "%75", "%76", "%77")
  FC_CASE(10, "160", "%80", "%81", "%82", "%83", "%84", "%85")
  FC_CASE(11, "176", "%88", "%89", "%90", "%91", "%92", "%93")
  FC_CASE(12, "192", "%96", "%97", "%98", "%99", "%100", "%101")
  FC_CASE(13, "208", "%104", "%105", "%106", "%107", "%108", "%109")
  FC_CASE(14, "224", "%112", "%113", "%114", "%115", "%116", "%117")
  FC_CASE(15, "240", "%120", "%121", "%122", "%123", "%124", "%125")
  FC_CASE(16, "256", "%128", "%129", "%130", "%131", "%132", "%133")
  { static_assert(FRAGS < 0, "N is 16, 32, .. or 256"); }
#undef FC_CASE
}

// d = A B (+ d): A 64 x 16 in registers, B 16 x N in shared memory, contiguous along n.
template <class T, int FRAGS>
FC_DEVICE void wgmma_rs(WmmaAccum (&d)[FRAGS], const WmmaA<T>& a, WgmmaDesc b_desc,
                        bool accumulate) {
  wgmma_of_registers<T, true>(d, a, b_desc, accumulate);
}

// d = A B^T (+ d): A 64 x 16 in registers, B N x 16 in shared memory, contiguous along k.
template <class T, int FRAGS>
FC_DEVICE void wgmma_rs_k(WmmaAccum (&d)[FRAGS], const WmmaA<T>& a, WgmmaDesc b_desc,
                          bool accumulate) {
  wgmma_of_registers<T, false>(d, a, b_desc, accumulate);
}
