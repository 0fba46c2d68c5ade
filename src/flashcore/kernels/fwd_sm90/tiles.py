"""Choose by rules the tiles of the Hopper kernel, made from measurements. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from flashcore.kernels.cutting import cuts_packed_keys, has_few_rows, lengths_differ
from flashcore.kernels.fwd_sm90.splits import best_sharing, may_add_up_together
from flashcore.kernels.limits import smem_limits
from flashcore.kernels.stream_k import key_tile_bytes, share_row_bytes, visible_keys
from flashcore.problem.folding import fold_heads, mean_sequences

if TYPE_CHECKING:
    from flashcore.problem import Problem

ARCH = 90
NUM_SMS = 132
ROWS_OF_CONSUMER = 64
PAGE_ROWS = 8  # of which a page has a multiple: what TMA swizzles together
MASK_ELEMENT_BYTES = {"bool": 1, "tree": 1, "float16": 2, "bfloat16": 2, "float32": 4}
STREAMED_BYTES = 96 * 1024
SMALL_PAGE = 32  # keys, of which a tile of 128 has several
_MIXED_ROWS = 256  # of a packed sequence in the mean
BYTES_OF_TWO = 64 * 1024  # of each of two blocks of an SM
_TINY_PAGE = 16  # keys, of which a tile of 48 has whole ones


def splits_sectors(head_dim: int, head_dim_v: int) -> bool:
    """Return whether rows start inside of a 32-byte sector, so that every piece of one that TMA
    fetches takes an access more; of those that have several pieces and rules of their own."""
    is_odd = head_dim % 16 != 0 or head_dim_v % 16 != 0
    return is_odd and 64 < max(head_dim, head_dim_v) <= 128


def chunk_of(head_dim: int, head_dim_v: int) -> int:
    """Return the number of columns of a tile that lie together in shared memory, and that TMA
    fetches of a row at once: 64 where that pads a tile no more than 32 would, or halves accesses
    that bound the kernel."""
    of_64, of_32 = (-(-head_dim // size) - (-head_dim_v // size) for size in (64, 32))
    return 64 if 2 * of_64 == of_32 or splits_sectors(head_dim, head_dim_v) else 32


def padded_dims(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """Return the number of columns of a tile of q or k and of one of v, whole chunks."""
    chunk = chunk_of(head_dim, head_dim_v)
    return -(-head_dim // chunk) * chunk, -(-head_dim_v // chunk) * chunk


def mask_bytes(dtype: str, is_row: bool, block_n: int) -> int:
    """Return shared memory of one consumer for a mask tensor's elements."""
    element = MASK_ELEMENT_BYTES[dtype]
    row = block_n + (16 if element == 1 else 8)
    return 4 * (1 if is_row else 16) * row * element


def mask_traits(problem: Problem) -> dict[str, Any]:
    """Return the fields of a plan that say how a mask tensor is read
    (fwd_sm90/mask_tile_sm90.cuh)."""
    mask = problem.mask
    if mask is None:
        return {}
    # Few kinds, as each is compiled: lengths of all remainders meet the same ones.
    load_bytes = next(width for width in (16, 4, 1) if width <= mask.load_bytes)
    is_shifted = load_bytes < 4 and mask.strides[3] == 1 and mask.dtype != "tree"
    if is_shifted:
        load_bytes = 8 * MASK_ELEMENT_BYTES[mask.dtype]
    return {
        "mask_load_bytes": load_bytes,
        "mask_is_row": mask.strides[2] == 0,
        "mask_is_shifted": is_shifted,
    }


def folded(problem: Problem, num_heads: int) -> Problem:
    """Return what tiles are chosen for: `num_heads` heads, if there are, as rows of one; of packed
    sequences a batch of equal ones."""
    if not problem.packs_queries:
        return fold_heads(problem, num_heads) if num_heads else problem
    return mean_sequences(problem, num_heads)


class Tile(NamedTuple):
    """A tile holds what the rules say; the other fields of a plan follow from the problem."""

    block_m: int
    block_n: int
    ping_pong: bool = False
    min_blocks: int = 1
    num_stages: int = 2
    q_buffers: int = 1
    key_slices: int = 1
    num_splits: int = 1
    stream_k: bool = False  # ranges of equal length, instead of num_splits
    parts: int = 1  # that folded heads are dealt out to
    load_stages: int = 0  # of bytes, of 8-bit caches that are converted
    strips: int = 0  # with 8 rows each, whose warps share 8-bit tiles


def split_keys(problem: Problem, tile: Tile, folded: int = 1) -> Tile:
    """Return the tile with its keys split over as many blocks as pays, and the rows of `folded`
    heads dealt out to as many row tiles. Of few rows whose keys only the device can count, the
    device cuts the work (tile/stream_k.cuh)."""
    if problem.packs_queries:
        return tile._replace(stream_k=cuts_packed_keys(problem, tile.block_m, tile.block_n))
    dims = problem.head_dim, problem.head_dim_v
    cut = lengths_differ(problem, tile.block_m, tile.block_n)
    sharing = best_sharing(
        num_heads=problem.batch * problem.num_heads_q,
        num_rows=problem.seqlen_q,
        folded=folded,
        block_m=tile.block_m,
        key_tiles=-(-visible_keys(problem) // tile.block_n),
        key_tile_bytes=key_tile_bytes(tile.block_n, *dims, problem.cache_bytes),
        share_row_bytes=share_row_bytes(problem.head_dim_v),
        num_slots=NUM_SMS * tile.min_blocks,
        together=not cut and may_add_up_together(problem, tile.min_blocks),
    )
    # Wide heads of many rows leave a producer no registers for that.
    pays = problem.seqlen_q <= ROWS_OF_CONSUMER or (max(dims) <= 128 and sharing.num_splits > 1)
    if pays and cut:
        return tile._replace(stream_k=True, parts=sharing.parts)
    return tile._replace(num_splits=sharing.num_splits, parts=sharing.parts)


def _streaming_tile(problem: Problem, folded: int) -> Tile:
    """Return the tile for rows so few that reading K and V is all there is to do: one consumer,
    and 96 KB of stages under way, or 64 KB a block where two are on an SM. More is slower: 192
    KB by 2 to 7 %, at each head_dim. An SM's 33 GB/s over 1 us of latency are 32 KB. Pages, which
    take longer to load, want shorter tiles (docs/ladder-masks.md)."""
    dims = padded_dims(problem.head_dim, problem.head_dim_v)
    narrow = max(dims) <= 64
    in_pages = problem.has_pages and problem.mask is None and not problem.batch_invariant
    wide = in_pages and max(dims) > 128 and problem.page_size <= SMALL_PAGE
    pairs = problem.varlen != "none" and problem.mask is None and max(dims) <= 192
    block_n = 128 if narrow and not in_pages else 64
    if wide or (pairs and max(dims) > 128):
        block_n = 32
    elif (
        in_pages and not narrow and problem.page_size <= _TINY_PAGE and 48 % problem.page_size == 0
    ):
        block_n = 48
    if pairs:
        q_buffers = 2 if max(dims) <= 128 else 1
        room = smem_limits(ARCH)[1] // 2 - 2048 - 2 * ROWS_OF_CONSUMER * dims[0] * q_buffers
        read = 2 * block_n * (problem.head_dim + problem.head_dim_v)
        num_stages = max(2, min(-(-BYTES_OF_TWO // read), room // (2 * block_n * sum(dims))))
        tile = Tile(64, block_n, num_stages=num_stages, min_blocks=2, q_buffers=q_buffers)
        return split_keys(problem, tile, folded)
    if narrow and problem.mask is None:
        return split_keys(problem, Tile(64, block_n, num_stages=2, min_blocks=2), folded)
    room = smem_limits(ARCH)[0] - 1024 - 2 * ROWS_OF_CONSUMER * sum(dims)
    if problem.mask is not None:
        room -= mask_bytes(problem.mask.dtype, problem.mask.strides[2] == 0, block_n)
    stage = 2 * block_n * sum(dims)
    read = 2 * block_n * (problem.head_dim + problem.head_dim_v)  # of a stage: the rest is padding
    num_stages = max(2, min(-(-STREAMED_BYTES // read), room // stage))
    return split_keys(problem, Tile(64, block_n, num_stages=num_stages), folded)


def tiles(problem: Problem, folded: int, longest: int = 0) -> Iterator[Tile]:
    """Return tiles, best first, of a problem whose heads are `folded` heads each, and of which a
    packed sequence has at most `longest` queries. Keys much longer than the rows are worth
    splitting where that fills the GPU."""
    long_keys = problem.seqlen_k >= max(4096, 8 * problem.seqlen_q)
    if has_few_rows(problem):
        num_tiles = problem.batch * problem.num_heads_q
        if problem.seqlen_k >= 1024 or (problem.seqlen_k >= 512 and num_tiles > NUM_SMS):
            yield _streaming_tile(problem, folded)
    if folded > 1 and _is_mixed(problem, longest):
        yield Tile(64, 64, min_blocks=2, q_buffers=2)
    for tile in _table(problem):
        consumers = tile.block_m // ROWS_OF_CONSUMER * tile.key_slices
        if folded > 1 and problem.packs_queries and consumers > 2:
            continue  # three spill; and of decodes two thirds of 192 rows would be nobody's
        yield split_keys(problem, tile) if long_keys else tile


def _is_mixed(problem: Problem, longest: int) -> bool:
    """Return whether packed queries are single tokens and a prompt's part, over pages so small that
    a tile of 128 keys has several. Two blocks of an SM have two warps that load, and fewer rows of
    nobody: with pages of 64 299 us instead of 353 for 63 tokens beside 2048. Where the prompt is
    most of the work, or all parts are alike, 128 rows are faster (docs/ladder-decoding.md)."""
    if not problem.has_pages or problem.page_size >= 128 or problem.seqlen_q > _MIXED_ROWS:
        return False
    is_plain = problem.mask is None and problem.softcap == 0.0
    if not is_plain or not 64 < max(problem.head_dim, problem.head_dim_v) <= 128:
        return False
    others = problem.batch - 1
    return 8 * problem.total_q <= longest * problem.batch and longest + others <= problem.total_q


def batch_invariant_tiles(problem: Problem, is_cut: bool) -> Iterator[Tile]:
    """Return tiles of batch-invariant calls, whose keys follow from head_dim and options alone:
    with `is_cut` those for few queries, whose keys are cut into pieces of one length
    (tile/stream_k.cuh)."""
    dim = max(problem.head_dim, problem.head_dim_v)
    if is_cut:
        tile = _streaming_tile(problem, 1)
        yield tile._replace(num_splits=1, stream_k=True, parts=1)
        return
    is_plain = problem.mask is None and problem.softcap == 0.0
    if dim <= 128:
        if is_plain:
            yield Tile(128, 64, ping_pong=True)
        yield Tile(64, 64, min_blocks=2)
    elif is_plain:
        yield Tile(128, 48, ping_pong=True)
    yield Tile(128, 32, ping_pong=True)


def _table(problem: Problem) -> Iterator[Tile]:
    """Return tiles by rules made from measurements on an H200 (2026-11-22) and an H100
    (2026-11-25), best first; see docs/ladder.md. What `flashcore tune --grid` measures goes before
    them (selection/tile_table.py)."""
    dim = max(problem.head_dim, problem.head_dim_v)
    num_64 = _num_row_tiles(problem, 64)
    # Few rows: warpgroups share their keys, and hide each other's latency.
    is_long = is_bounded(problem) and problem.seqlen_k >= 1024
    few = num_64 <= NUM_SMS * (2 if is_long else 1)
    if num_64 <= NUM_SMS and dim <= 64 and problem.mask is None and 256 < problem.seqlen_k < 4096:
        # Three stages each, where there are three key tiles to load at once.
        num_stages = 6 if is_bounded(problem) and problem.seqlen_k < 640 else 9
        yield Tile(64, 64, num_stages=num_stages, key_slices=3)
    if few and dim <= 128 and problem.seqlen_k > (64 if dim <= 64 else 128):
        yield Tile(64, 64, num_stages=4, key_slices=2)
    if problem.mask is None and problem.softcap == 0.0:
        yield from _plain_table(problem, dim)
    else:
        yield from _crowded_table(problem, dim)


def is_bounded(problem: Problem) -> bool:
    """Return whether a window hides some keys."""
    return problem.window_left >= 0 or problem.window_right >= 0


def _window(problem: Problem) -> int:
    """Return the number of keys that a query sees at most, by the windows alone."""
    if problem.window_left < 0:
        return problem.seqlen_k
    right = problem.window_right if problem.window_right >= 0 else problem.seqlen_k
    return problem.window_left + 1 + right


def _num_row_tiles(problem: Problem, rows: int) -> int:
    return problem.batch * problem.num_heads_q * -(-problem.seqlen_q // rows)


def _plain_table(problem: Problem, dim: int) -> Iterator[Tile]:
    """Return the table of calls with neither mask tensor nor soft-capping."""
    bounded, keys = is_bounded(problem), problem.seqlen_k
    many_192 = _num_row_tiles(problem, 192) >= 2 * NUM_SMS
    if dim <= 64:
        # Or 192 rows spill: what deals out packed tiles takes registers, too.
        is_large = problem.window_left >= 0 or (bounded and problem.packs_queries)
        q_buffers = 1 if is_large else 2
        if many_192 and keys >= (2048 if bounded else 512):
            yield Tile(192, 128, ping_pong=True, num_stages=3, q_buffers=q_buffers)
        if _num_row_tiles(problem, 64) >= (3 if bounded else 6) * NUM_SMS:
            yield Tile(64, 64 if keys < 1024 else 96, min_blocks=3, q_buffers=q_buffers)
        yield Tile(64, 128, min_blocks=2)
        yield Tile(128, 128, ping_pong=True)
    elif dim <= 128:
        if many_192 and splits_sectors(problem.head_dim, problem.head_dim_v) and keys >= 512:
            yield Tile(192, 96 if dim <= 96 else 80, ping_pong=True)  # TMA's accesses bound it
        if many_192 and min(keys, _window(problem)) >= 4096:
            yield Tile(192, 80, ping_pong=True)
        if 4 * _num_row_tiles(problem, 128) >= 3 * NUM_SMS:
            yield Tile(128, 128)
        yield Tile(64, 64, min_blocks=2)
        yield Tile(128, 128)
    elif dim <= 192:
        yield Tile(128, 96, ping_pong=True)
        yield Tile(128, 64, ping_pong=True)
    else:
        yield Tile(128, 64, ping_pong=True)
        yield Tile(128, 48, ping_pong=True)
        yield Tile(128, 32, ping_pong=True)


def _crowded_table(problem: Problem, dim: int) -> Iterator[Tile]:
    """Return the table of calls whose softmax takes registers for more. A mask tensor with a row
    for every query takes some, more where it holds numbers, and most where its rows are not
    aligned. Large tiles read K and V less often, beside bytes of a mask (docs/ladder-masks.md)."""
    mask, has_softcap, bounded = problem.mask, problem.softcap != 0.0, is_bounded(problem)
    has_rows = mask is not None and mask.strides[2] != 0
    number = mask.dtype if mask and has_rows and mask.dtype not in ("bool", "tree") else None
    is_aligned = mask is None or mask.load_bytes == 16
    many_192 = _num_row_tiles(problem, 192) >= 2 * NUM_SMS and problem.seqlen_k >= 1024
    is_large = many_192 and is_aligned and not (has_softcap or bounded)
    is_large &= not has_rows or not (problem.varlen != "none" or problem.return_max_score)
    if is_large and (not number or dim > 32) and dim <= (128 if number == "float32" else 64):
        yield Tile(192, 128 if dim <= 64 else 64, ping_pong=True)
    if dim <= 64:
        if not has_rows and (mask is None or not has_softcap):
            many = _num_row_tiles(problem, 64) >= (3 if bounded else 6) * NUM_SMS
            if many and not problem.has_pages:  # whose producer takes registers
                yield Tile(64, 64, min_blocks=3)
        yield Tile(64, 128, min_blocks=2)
        yield Tile(64, 64, min_blocks=2)
    elif dim <= 128:
        if 4 * _num_row_tiles(problem, 128) >= 3 * NUM_SMS:
            if number != "float32":
                yield Tile(128, 128, ping_pong=has_softcap or not is_aligned)
            yield Tile(128, 80, ping_pong=True)
        yield Tile(64, 64, min_blocks=2)
    elif dim <= 192:
        if number is None:
            yield Tile(128, 96, ping_pong=not has_softcap)
        yield Tile(128, 64, ping_pong=True)
    else:
        overfull = mask is not None and problem.window_left >= 0 and (has_softcap or not is_aligned)
        overfull |= mask is not None and problem.has_pages  # whose producer takes registers
        if number is None and not overfull:
            yield Tile(128, 64, ping_pong=not has_softcap)
        if mask is None or not problem.packs_queries:  # folded heads with trees would spill
            yield Tile(128, 48, ping_pong=True)
        yield Tile(128, 32, ping_pong=True)
