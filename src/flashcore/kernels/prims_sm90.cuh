// prims_sm90.cuh - what Hopper kernels (sm_90a) use on top of prims.cuh; same rules.
//
// mbarrier.cuh    A barrier in shared memory is a SmemPtr<uint64_t> (PTX ISA: mbarrier).
//                 mbar_init(bar, count), mbar_init_fence(): by one thread, then block_sync()
//                 mbar_arrive(bar), mbar_arrive_expect_tx(bar, bytes)
//                 mbar_wait(bar, parity): until the phase of that parity has completed
//                 mbar_test(bar, parity): whether it has
// tma.cuh         TensorMap: 128 opaque bytes in the kernel's parameters (encoded by the launcher)
//                 tma_prefetch_map(map): fetches the descriptor ahead of its first use
//                 tma_load(smem_dst, map, bar, col, row, head, batch): one box, whose bytes count
//                 towards bar; zeros outside of the tensor (PTX ISA: cp.async.bulk.tensor)
//                 tma_load_chunks(smem_dst, map, bar, col, row, chunk, head, batch): of a map that
//                 says that columns come in chunks: rows of all of them, one after the other
//                 tma_store(map, smem_src, col, row, head, batch), tma_store_commit(),
//                 tma_store_wait_read<N>(): all but the newest N groups have read their source
//                 tma_store_wait<N>(): all but the newest N groups are complete
//                 bulk_add(gmem_dst, smem_src, bytes): adds floats to floats that nobody reads; in
//                 groups as tma_store (cp.reduce.async.bulk). Whoever adds to the same must know
//                 that this is complete, or the order of the two is open
//                 bulk_store(gmem_dst, smem_src, bytes): the same in place of what lies there
// warpgroup.cuh   named_barrier_sync(id, threads), named_barrier_arrive(id, threads)
//                 named_barrier_any(id, threads, predicate): whether it holds for any of them
//                 raise_registers<N>(), lower_registers<N>(): of the whole warpgroup (setmaxnreg)
//                 fence_proxy_async(): writes to shared memory that this thread knows of, its own
//                 among them, become visible to TMA and WGMMA
//                 fence_proxy_async_global(): what this thread knows of global memory comes before
//                 what it asks TMA for from here on
//                 elect_lane(): true in one lane of the warp
//                 stmatrix_x4(p, reg): a 16x16 fragment's four 8x8 matrices; lane l gives the
//                 address of row l % 8 of matrix l / 8 (PTX ISA: stmatrix)
//                 ldmatrix_x4(p, reg), ldmatrix_x4_trans(p, reg): rows of 16 bytes are addressed in
//                 the same way; register m of lane l has elements 2 (l % 4) and the next one of row
//                 l / 4 of matrix m, or of the transposed matrix, elements of 16 bits (PTX ISA:
//                 ldmatrix)
// mma8.cuh        MmaB8<T>: a 16x8 operand B (PTX ISA: mma.m16n8k16): reg[i] of lane 4 r + c has
//                 B[k][r] and B[k + 1][r] of k = 2 c + 8 i
//                 mma8_transposed<HALF>(accum, a, b): adds (A B)^T, 8x16, to accum.x[4 HALF + i]:
//                 row 2 c + i / 2 and column r + i % 2 * 8, so that a lane has two rows as ever
//                 transpose8x8(x): lane 4 r + c gives elements 2 c and 2 c + 1 of row r of an 8x8
//                 matrix of 16 bits, and gets those of the transposed one (PTX ISA: movmatrix)
// wgmma.cuh       WmmaAccum d[N / 16]: 64 x N accumulator of a warpgroup; warp w holds rows 16 w to
//                 16 w + 15, each fragment as in wmma.cuh (PTX ISA: wgmma.mma_async)
//                 wgmma_desc<ROW_BYTES>(p, leading_bytes, pattern_bytes): a swizzled operand tile,
//                 rows of ROW_BYTES (64 or 128) as TMA writes them; leading_bytes between column
//                 chunks (MN-major), pattern_bytes between eight rows and the next, which else
//                 follow; desc + bytes: the same operand further on
//                 swizzled_col<ROW_BYTES>(row, col): where a column lies in such a tile
//                 wgmma_ss<T>(d, a_desc, b_desc, accumulate): A[m][k] and B[n][k], k contiguous
//                 wgmma_ss_mn<T>(d, a_desc, b_desc, accumulate): A[k][m] and B[k][n], m and n
//                 contiguous
//                 wgmma_rs<T>(d, a, b_desc, accumulate): A from registers, B[k][n], n contiguous
//                 wgmma_rs_k<T>(d, a, b_desc, accumulate): A from registers, B[n][k], k contiguous
//                 wgmma_fence(): orders register writes before the wgmma that read them
//                 wgmma_commit(), wgmma_wait<N>(): groups, as for cp.async; until then nobody may
//                 touch the registers of a pending wgmma
//                 wgmma_hold(d): no use of d is moved up across this point; wgmma_hold(a): what
//                 computes operand fragments is not moved down across it
#pragma once

#include "prims.cuh"
#include "@target/mbarrier.cuh"
#include "@target/mma8.cuh"
#include "@target/tma.cuh"
#include "@target/warpgroup.cuh"
#include "@target/wgmma.cuh"
