"""Rules for the tiles of the Hopper kernel, made from measurements. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from flashcore.limits import smem_limits
from flashcore.plan_splits import best_sharing, visible_keys

if TYPE_CHECKING:
    from flashcore.problem import Problem

ARCH = 90
NUM_SMS = 132
ROWS_OF_CONSUMER = 64
_MASK_ELEMENT_BYTES = {"bool": 1, "float16": 2, "bfloat16": 2, "float32": 4}
_STREAMED_BYTES = 96 * 1024


def chunk_of(head_dim: int, head_dim_v: int) -> int:
    """Columns of a tile that lie together in shared memory."""
    return 64 if head_dim % 64 == 0 and head_dim_v % 64 == 0 else 32


def mask_bytes(dtype: str, is_row: bool, block_n: int) -> int:
    """Shared memory of one consumer for a mask tensor's elements."""
    element = _MASK_ELEMENT_BYTES[dtype]
    row = block_n + (16 if element == 1 else 8)
    return 4 * (1 if is_row else 16) * row * element


class Tile(NamedTuple):
    """What the rules say; the other fields of a plan follow from the problem."""

    block_m: int
    block_n: int
    ping_pong: bool = False
    min_blocks: int = 1
    num_stages: int = 2
    key_splits: int = 1
    num_splits: int = 1
    parts: int = 1  # that folded heads are dealt out to


def _split_keys(problem: Problem, tile: Tile, folded: int = 1) -> Tile:
    """The tile with its keys split over as many blocks as pays, and the rows of `folded` heads
    dealt out to as many row tiles."""
    if problem.varlen == "packed":
        return tile
    dims = problem.head_dim + problem.head_dim_v
    sharing = best_sharing(
        num_heads=problem.batch * problem.num_heads_q,
        num_rows=problem.seqlen_q,
        folded=folded,
        block_m=tile.block_m,
        key_tiles=-(-visible_keys(problem) // tile.block_n),
        key_tile_bytes=tile.block_n * dims * 2,
        share_row_bytes=(problem.head_dim_v + 2) * 4,
        num_slots=NUM_SMS * tile.min_blocks,
    )
    return tile._replace(num_splits=sharing.num_splits, parts=sharing.parts)


def _streaming_tile(problem: Problem, folded: int) -> Tile:
    """Of rows so few that reading K and V is all there is to do: one consumer, and 96 KB of stages
    under way, or 64 KB a block where two are on an SM. More is slower: 192 KB by 2 to 7 %, at each
    head_dim (docs/ladder.md). An SM's 33 GB/s over 1 us of latency are 32 KB."""
    chunk = chunk_of(problem.head_dim, problem.head_dim_v)
    dims = [-(-dim // chunk) * chunk for dim in (problem.head_dim, problem.head_dim_v)]
    narrow = max(dims) <= 64
    block_n = 128 if narrow else 64
    room = smem_limits(ARCH)[0] - 1024 - 2 * ROWS_OF_CONSUMER * sum(dims)
    if problem.mask is not None:
        room -= mask_bytes(problem.mask.dtype, problem.mask.strides[2] == 0, block_n)
    stage = 2 * block_n * sum(dims)
    if narrow and problem.mask is None:
        return _split_keys(problem, Tile(64, block_n, num_stages=2, min_blocks=2), folded)
    num_stages = max(2, min(-(-_STREAMED_BYTES // stage), room // stage))
    return _split_keys(problem, Tile(64, block_n, num_stages=num_stages), folded)


def tiles(problem: Problem, folded: int) -> Iterator[Tile]:
    """Best first, of a problem whose heads are `folded` heads each. Keys much longer than the rows
    are worth splitting where that fills the GPU."""
    long_keys = problem.seqlen_k >= max(4096, 8 * problem.seqlen_q)
    if problem.varlen != "packed" and problem.seqlen_q <= ROWS_OF_CONSUMER:
        num_tiles = problem.batch * problem.num_heads_q
        if problem.seqlen_k >= 1024 or (problem.seqlen_k >= 512 and num_tiles > NUM_SMS):
            yield _streaming_tile(problem, folded)
    for tile in _table(problem):
        yield _split_keys(problem, tile) if long_keys else tile


def _table(problem: Problem) -> Iterator[Tile]:
    """Rules made from measurements on an H200 (2026-11-22) and an H100 (2026-11-25), best first;
    see docs/ladder.md. What `flashcore tune --grid` measures goes before them (tile_table.py)."""
    dim = max(problem.head_dim, problem.head_dim_v)
    heads = problem.batch * problem.num_heads_q
    mask, has_softcap = problem.mask, problem.softcap != 0.0
    # A mask tensor with a row for every query takes registers, more where it holds numbers, and
    # most where its rows are not aligned. One row for all is nearly as good as none.
    has_rows = mask is not None and mask.strides[2] != 0
    has_numbers = mask is not None and has_rows and mask.dtype != "bool"
    is_aligned = mask is None or mask.load_bytes == 16
    bounded = problem.window_left >= 0 or problem.window_right >= 0
    keys = problem.seqlen_k
    num_64, num_128, num_192 = (heads * -(-problem.seqlen_q // rows) for rows in (64, 128, 192))
    # Few rows: their keys are shared between two warpgroups, which hide each other's latency.
    few = num_64 <= NUM_SMS or (bounded and num_64 <= 2 * NUM_SMS and keys >= 1024)
    if few and dim <= 128 and keys > (64 if dim <= 64 else 128):
        yield Tile(64, 64, num_stages=4, key_splits=2)
    if dim <= 64:
        if num_192 >= 2 * NUM_SMS and not has_softcap:
            if mask is None and keys >= (2048 if bounded else 512):
                turns = not bounded or keys < 8192
                yield Tile(192, 128, ping_pong=turns, num_stages=2 if bounded else 3)
            elif not has_rows and not bounded and is_aligned and keys >= 1024:
                yield Tile(192, 128, ping_pong=True)
        crowded = has_rows or (mask is not None and has_softcap)
        if num_64 >= (3 if bounded else 6) * NUM_SMS and not crowded:
            wide = keys >= 1024 and mask is None and not has_softcap
            yield Tile(64, 96 if wide else 64, min_blocks=3)
        if has_rows and not is_aligned and num_64 >= 2 * NUM_SMS:
            yield Tile(128, 128, ping_pong=True)
        yield Tile(64, 128, min_blocks=2)
        yield Tile(64, 64, min_blocks=2)
        yield Tile(128, 128, ping_pong=True)
    elif dim <= 128:
        if keys >= 4096 and num_192 >= 2 * NUM_SMS and mask is None and not has_softcap:
            yield Tile(192, 80, ping_pong=True)
        if 4 * num_128 >= 3 * NUM_SMS:
            if not (has_numbers and mask is not None and mask.dtype == "float32"):
                yield Tile(128, 128, ping_pong=has_softcap)
            yield Tile(128, 80, ping_pong=True)
        yield Tile(64, 64, min_blocks=2)
        yield Tile(128, 128)
    elif dim <= 192:
        if not has_numbers:
            yield Tile(128, 96, ping_pong=not has_softcap)
        yield Tile(128, 64, ping_pong=True)
    else:
        crowded = mask is not None and problem.window_left >= 0 and (has_softcap or not is_aligned)
        if not has_numbers and not crowded:
            yield Tile(128, 64, ping_pong=not has_softcap)
        yield Tile(128, 48, ping_pong=True)
        yield Tile(128, 32, ping_pong=True)
