"""Choose by rules the tiles of the Hopper kernel for caches of 8 bits. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashcore.kernels.fwd_sm90.float8.strips import (
    ROWS_OF_STRIP,
    loaded_dims,
    most_strips,
    shared_bytes,
    strips_of_warp,
)
from flashcore.kernels.fwd_sm90.tiles import (
    ARCH,
    BYTES_OF_TWO,
    ROWS_OF_CONSUMER,
    SMALL_PAGE,
    STREAMED_BYTES,
    Tile,
    is_bounded,
    mask_bytes,
    padded_dims,
    split_keys,
)
from flashcore.kernels.limits import smem_limits

if TYPE_CHECKING:
    from flashcore.problem import Problem


def float8_tiles(problem: Problem, folded: int) -> Iterator[Tile]:
    """Return tiles, best first, of a problem whose heads are `folded` heads each."""
    # With 128 keys a window and soft-capping spill beside packed rows.
    crowded = problem.packs_queries and problem.softcap and is_bounded(problem)
    for tile in _unsplit_tiles(problem):
        if crowded and tile.block_n > 64:
            continue
        yield split_keys(problem, tile, folded)


def few_rows_tiles(problem: Problem) -> Iterator[Tile]:
    """Return the tile of 8-bit caches whose row tiles have so few rows that warps share the keys of
    a key tile (fwd_sm90/float8/few_rows_sm90.cuh), if they do."""
    dims = problem.head_dim, problem.head_dim_v
    strips = _strips_of(problem.seqlen_q)
    if strips > most_strips(*dims) or problem.packs_queries or problem.mask is not None:
        return
    columns = sum(loaded_dims(*dims))
    # Several boxes bring a tile from pages, and longer ones later; small ones take as long anyway.
    in_boxes = problem.has_pages and problem.page_size > SMALL_PAGE
    block_n = 256 if columns <= 128 and not in_boxes else 128
    of_q = 2 * ROWS_OF_STRIP * strips * padded_dims(*dims)[0]
    fixed = 2048 + shared_bytes(strips_of_warp(strips, *dims), -(-dims[1] // 16) * 16)
    for min_blocks in (2, 1):
        for q_buffers in (2, 1) if strips > 1 else (2,):
            room = smem_limits(ARCH)[1] // min_blocks - fixed - q_buffers * of_q
            streamed = STREAMED_BYTES if min_blocks == 1 else BYTES_OF_TWO
            wanted = max(2, -(-streamed // (block_n * columns)))
            if (num_stages := min(wanted, room // (block_n * columns))) >= 2:
                yield Tile(
                    ROWS_OF_STRIP * strips, block_n, num_stages=num_stages, min_blocks=min_blocks,
                    q_buffers=q_buffers, strips=strips,
                )  # fmt: skip
                return


def _strips_of(num_rows: int) -> int:
    """Return the strips of so many rows, 1, 2, 4 and so on."""
    return 1 << (max(1, -(-num_rows // ROWS_OF_STRIP)) - 1).bit_length()


def _unsplit_tiles(problem: Problem) -> Iterator[Tile]:
    """Return tiles of 8-bit caches, best first: two converted tiles, and as many as fit that are
    still bytes, up to `STREAMED_BYTES`. The more keys a tile has, the less its hand-overs cost,
    some 550 cycles (H200, 2026-11-29, B16 H32/8 S1/8192 D128 bfloat16: 154 us with 32 keys, 98 with
    64, 86 with 128; D64, with twice the batch: 154 with 64, 127 with 128)."""
    yield from few_rows_tiles(problem)
    # With 128 rows four warpgroups share the registers, 128 a thread until they part: too few for
    # the product that makes a wide O.
    few = problem.seqlen_q <= ROWS_OF_CONSUMER or problem.head_dim_v > 192
    dims = sum(padded_dims(problem.head_dim, problem.head_dim_v))
    for block_m in (64,) if few else (128, 64):
        for block_n in (128, 64, 48, 32) if block_m == 64 else (64, 48, 32):
            room = smem_limits(ARCH)[0] - 2048 - 2 * block_m * dims - 2 * 2 * block_n * dims
            if problem.mask is not None:
                of_consumer = mask_bytes(problem.mask.dtype, problem.mask.strides[2] == 0, block_n)
                room -= block_m // ROWS_OF_CONSUMER * of_consumer
            load_stages = min(room, STREAMED_BYTES) // (block_n * dims)
            if load_stages >= 2:
                yield Tile(block_m, block_n, num_stages=2, load_stages=load_stages)
