// prims.cuh - the contract that every kernel in this folder is written against.
//
// A kernel includes this header and nothing else of the outside world. `@target` is replaced by the
// source generator (compile/codegen.py) with `ptx` for a GPU and with `host` for the simulator, so
// the same kernel text compiles for both. Both sides define the same names with the same
// signatures:
//
// types.cuh       int32_t uint32_t int64_t uint64_t; float16, bfloat16 (2-byte storage types);
//                 FC_DEVICE (inline function), FC_KERNEL(name, threads, min_blocks) (entry point)
//                 to_float(x), from_float<T>(x), pack2<T>(lo, hi): two T in one 32-bit register
//                 mul2<T>(a, b): products of two such pairs
//                 float8 (e4m3, a 1-byte storage type); from sm_89 on widen4<T>(word, pairs): the
//                 four float8 of a 32-bit register as two registers of two T, exact; a NaN is one
//                 narrow2(lo, hi): two floats as float8, saturated; if NARROWS_FLOAT8
// thread.cuh      thread_idx() block_idx() lane_idx() warp_idx()
//                 shfl_xor(x, lane_mask) of float or int, warp_any(predicate): all 32 lanes must
//                 arrive; they order no memory
//                 warp_uniform(x): x, an int with the same value in all lanes, so that the compiler
//                 keeps it in a uniform register; all 32 lanes must arrive
// math.cuh        exp2_approx log2_approx rcp_approx fma_rn max_f abs_f min_i max_i, NEG_INF
//                 permute_bytes<SELECTOR>(low, high): four of their eight bytes (PTX ISA: prmt)
//                 opaque(x): x, hidden from the optimiser
// memory.cuh      SmemPtr<T>, GmemPtr<T>: bounded pointers; p + n moves by n elements
//                 smem_view<T>(byte_offset, count, "name"): a view of dynamic shared memory
//                 smem_load(p) smem_store(p, x) gmem_load(p) gmem_store(p, x): one element
//                 Packet<BYTES>: 2, 4, 8 or 16 bytes moved at once, naturally aligned
//                 smem_load_packet<BYTES>(p) smem_store_packet(p, packet), the same for gmem
//                 is_null(p); misalignment<BYTES>(gmem_p): bytes past the last multiple of BYTES
// async_copy.cuh  cp_async<BYTES>(smem_dst, gmem_src, valid): BYTES in 4, 8, 16; zero-fills the
//                 destination and does not touch the source when !valid (PTX ISA: cp.async)
//                 cp_async_commit() closes a group of this thread's copies; cp_async_wait<N>()
//                 waits for all groups of this thread but the newest N
// sync.cuh        block_sync() (orders all memory of the block), warp_sync() (of the warp)
// wmma.cuh        WmmaA<T> WmmaBCol<T> WmmaBRow<T> WmmaAccum: 16x16 fragments of one warp
//                 (PTX ISA: wmma; B's two types differ by the layout they are loaded from)
//                 wmma_load_a(frag, p, stride): A[m][k] at p[m * stride + k]
//                 wmma_load_a_col(frag, p, stride): A[m][k] at p[k * stride + m]
//                 wmma_load_b_col(frag, p, stride): B[k][n] at p[n * stride + k]   (K^T from K)
//                 wmma_load_b_row(frag, p, stride): B[k][n] at p[k * stride + n]   (V)
//                 wmma_fill(accum, x), wmma_clear(a), wmma_mma(accum, a, b): accum += a * b
//                 accum_row(lane, i), accum_col(lane, i): where accum.x[i], i < 8, of a lane sits
//                 wmma_accum_to_a(frag, accum): rounds to T; uses the map above and A's own map
//                 B's registers: reg[i] of lane 4 r + c has B[k][n] and B[k + 1][n] of
//                 k = 2 c + i % 2 * 8 and n = r + i / 2 * 8
//                 All 32 lanes must arrive with the same arguments. Loads read for all lanes: what
//                 another lane wrote must have been ordered by warp_sync() or block_sync() before.
// atomics.cuh     smem_atomic_add(p, x): float32, relaxed
//                 gmem_atomic_add(p, x): int32, relaxed; returns what was there before
//                 gmem_atomic_add_acq_rel(p, x): the same with acquire and release: what this
//                 thread has written or seen before its add is visible, in any block, to every
//                 thread whose later gmem_atomic_add_acq_rel finds that add in the sum
//                 gmem_load_acquire(p): an int32; makes visible what those have released whose
//                 gmem_atomic_add_acq_rel it finds in the sum. For polling, a bounded number of
//                 times: nobody may rely on another block to be there
//                 gmem_atomic_cas(p, expected, x): int32, relaxed; x if `expected` was there;
//                 returns what was there before
//                 gmem_release_add(p, x): int32, releases as that does, returns nothing
//                 gmem_await(p, value): until the int32 is `value`, which must be found by it: what
//                 those who have released by adding to it did before is visible. Only for blocks
//                 that run for sure: those that drew a number before this one's (TicketWalk), or
//                 of a kernel that lets this one start when all its blocks have
//                 gmem_atomic_max(p, x): float32, relaxed; NaN is larger than any number, so that
//                 the order of such calls makes no difference
// grid.cuh        grid_dependency_wait(): until the kernels before this one are done and their
//                 writes visible; before a thread's first access to global memory
//                 grid_starts_after_wait(): instead, where the kernel before this one lets it start
//                 only behind its own wait; what that one writes is waited for by gmem_await, and
//                 the kernel as a whole by a thread of each block, before it ends
//                 grid_launch_dependents(): the next kernel's blocks may start and wait for it
//                 (PTX ISA: griddepcontrol; before sm_90 both do nothing)
#pragma once

#include "@target/types.cuh"
#include "@target/thread.cuh"
#include "@target/math.cuh"
#include "@target/memory.cuh"
#include "@target/async_copy.cuh"
#include "@target/sync.cuh"
#include "@target/wmma.cuh"
#include "@target/atomics.cuh"
#include "@target/grid.cuh"
