"""Make the arguments of the Hopper kernel: TMA descriptors and launch parameters."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from flashcore.kernels import stream_k
from flashcore.kernels.fwd_sm90 import splits
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.kernels.fwd_sm90.tiles import PAGE_ROWS, ROWS_OF_CONSUMER
from flashcore.kernels.fwd_wmma import params
from flashcore.kernels.fwd_wmma.params import AttnGateParams, AttnParams
from flashcore.kernels.stream_k import share_row_bytes
from flashcore.kernels.tensor_map import TensorMap
from flashcore.problem import Problem
from flashcore.problem.folding import as_launched

_ELEMENT_BYTES = 2
MAPS = ("q", "k", "v", "o")


class AttnSm90Params(ctypes.Structure):
    """Mirror `struct AttnSm90Params` in kernels/attn_fwd_sm90.cuh; 64-byte aligned there."""

    _fields_ = [
        ("q_map", TensorMap),
        ("k_map", TensorMap),
        ("v_map", TensorMap),
        ("o_map", TensorMap),
        ("num_heads", ctypes.c_int32),
        ("heads_per_section", ctypes.c_int32),
        ("attn", AttnParams),
        ("padding", ctypes.c_uint8 * (-(ctypes.sizeof(AttnParams) + 8) % 64)),
    ]


class AttnSm90GateParams(ctypes.Structure):
    """Extend AttnSm90Params of a kernel that was built with a debug gate."""

    _fields_ = [
        *AttnSm90Params._fields_[:6],
        ("attn", AttnGateParams),
        ("padding", ctypes.c_uint8 * (-(ctypes.sizeof(AttnGateParams) + 8) % 64)),
    ]


def num_row_tiles(problem: Problem, plan: Sm90Plan) -> int:
    """Return the number of row tiles of all heads; of packed sequences as many as there can be."""
    if problem.packs_queries:
        return params.grid_size(problem, plan)
    problem = as_launched(problem, plan.folds_heads)
    return -(-problem.seqlen_q // plan.block_m) * problem.num_heads_q * problem.batch


def num_pieces(problem: Problem, plan: Sm90Plan) -> int:
    """Return what blocks take one after the other: row tiles, or parts of their keys."""
    if plan.stream_k:
        return stream_k.num_pieces(problem, plan)
    return num_row_tiles(problem, plan) * plan.num_splits


def split_shapes(problem: Problem, plan: Sm90Plan) -> dict[str, tuple[int, ...]]:
    """Return what blocks need that share the keys of row tiles (tile/shares.cuh), by field
    of AttnParams: counters and shares. On a GPU split_stats lies behind split_out."""
    if plan.stream_k:
        return stream_k.share_shapes(problem, plan)
    if not plan.shares_keys:
        return {}
    p = as_launched(problem, plan.folds_heads)
    rows: tuple[int, ...] = (plan.num_splits, p.batch, p.num_heads_q, p.seqlen_q)
    num_groups = num_row_tiles(problem, plan) * plan.row_groups
    return {
        "split_out": (*rows, plan.out_cols),
        "split_stats": (*rows, 2),
        "tile_counter": (2 * num_groups,),
    }


# Looks at the counter of a row tile's shares before a block goes on without those that lack. One
# takes some 0.5 us: blocks that started together have all handed over by then.
_MOST_POLLS = 32


def _most_polls(problem: Problem, plan: Sm90Plan) -> int:
    """Return how often blocks look for others' shares, which they add up together; 0 where the last
    one adds up alone."""
    if plan.stream_k or not splits.may_add_up_together(problem, plan.min_blocks):
        return 0
    rows = min(plan.block_m, as_launched(problem, plan.folds_heads).seqlen_q)
    share_bytes = rows * share_row_bytes(plan.head_dim_v)
    return _MOST_POLLS if splits.adds_up_together(plan.num_splits, share_bytes) else 0


# What K and V of a group of heads may take of L2: 50 MB on an H100 or H200, of which each half
# keeps a copy of what its SMs read; two groups are under way at a time, and q and out pass through.
_GROUP_BYTES = 8 << 20
# In a long run of tiles of at most 128 rows smaller groups are better, which mix long and short
# tiles; in a short one the last group would leave blocks without work (docs/ladder.md).
_LONG_RUN = 6  # row tiles a block
_SMALL_GROUP_BYTES = 4 << 20
_SMALL_GROUP = 0.6  # row tiles a block, at least


def heads_per_section(problem: Problem, plan: Sm90Plan, num_blocks: int) -> int:
    """Return the number of query heads whose row tiles `num_blocks` blocks draw together under a
    right bound (fwd_sm90/schedule_sm90.cuh): those of as many heads of K and V as L2 holds, and
    enough row tiles to keep the blocks busy."""
    is_long_run = num_row_tiles(problem, plan) >= _LONG_RUN * num_blocks
    problem = as_launched(problem, plan.folds_heads)
    num_heads = problem.num_heads_q * problem.batch
    heads_of_kv = problem.num_heads_q // problem.num_heads_kv
    bytes_of_kv = problem.cache_bytes * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    tiles_of_kv = max(1, heads_of_kv * -(-problem.seqlen_q // plan.block_m))
    if plan.block_m <= 128 and is_long_run:
        most_bytes, enough = _SMALL_GROUP_BYTES, math.ceil(_SMALL_GROUP * num_blocks / tiles_of_kv)
    else:
        most_bytes, enough = _GROUP_BYTES, round(num_blocks / tiles_of_kv)
    num_kv = max(1, most_bytes // max(1, bytes_of_kv), enough)
    return min(num_heads, heads_of_kv * num_kv)


def build_params_sm90(
    problem: Problem,
    plan: Sm90Plan,
    pointers: dict[str, int | None],
    num_blocks: int,
) -> AttnSm90Params | AttnSm90GateParams:
    """Return the kernel's argument.

    Args:
        problem: shapes, strides and options.
        plan: tiles and gate.
        pointers: address by field name, see params.build_params.
        num_blocks: of the launch.

    Returns:
        The filled structure, with tensor maps as the simulator reads them; see
        `tensor_map.encode_maps`.

    Raises:
        NotImplementedError: the problem is too large for one launch.
    """
    argument = AttnSm90Params() if plan.gate is None else AttnSm90GateParams()
    argument.attn = params.build_params(problem, plan, pointers)
    argument.attn.num_splits = plan.num_splits
    argument.attn.most_polls = _most_polls(problem, plan)
    if plan.stream_k:
        stream_k.set_ranges(argument.attn, problem, plan, num_blocks)
    argument.heads_per_section = heads_per_section(problem, plan, num_blocks)
    problem = as_launched(problem, plan.folds_heads)
    argument.num_heads = problem.num_heads_q * problem.batch
    for name in MAPS:
        _set_map(argument, name, problem, plan, pointers)
    return argument


def set_keys_sm90(
    argument: AttnSm90Params,
    problem: Problem,
    plan: Sm90Plan,
    pointers: dict[str, int | None],
    num_blocks: int,
) -> None:
    """Write what depends on the keys, the mask and their number alone; the maps of k and v as the
    simulator reads them.

    Args:
        argument: from `build_params_sm90` for a problem that differs in these alone.
        problem: shapes, strides and options.
        plan: as for the argument.
        pointers: of k and v.
        num_blocks: of the launch.
    """
    if plan.has_window_right:  # or nobody reads it
        argument.heads_per_section = heads_per_section(problem, plan, num_blocks)
    problem = as_launched(problem, plan.folds_heads)
    params.set_keys(argument.attn, problem)
    for name in ("k", "v"):
        _set_map(argument, name, problem, plan, pointers)


def _set_map(
    argument: AttnSm90Params | AttnSm90GateParams,
    name: str,
    problem: Problem,
    plan: Sm90Plan,
    pointers: dict[str, int | None],
) -> None:
    """Write the tensor map of one of MAPS, of a problem as the kernel sees it."""
    packed, pages = problem.packs_queries, problem.has_pages
    heads, kv_heads, dim_v = problem.num_heads_q, problem.num_heads_kv, problem.head_dim_v
    rows_q, rows_k = (
        (problem.total_q, problem.total_k) if packed else (problem.seqlen_q, problem.seqlen_k)
    )
    out_strides = (0, dim_v, heads * dim_v)
    if not packed:
        out_strides = (heads * rows_q * dim_v, rows_q * dim_v, dim_v)
    tensors: dict[str, tuple[Any, ...]] = {
        "q": (problem.q_strides, problem.head_dim, rows_q, heads),
        "k": (problem.k_strides, problem.head_dim, rows_k, kv_heads),
        "v": (problem.v_strides, dim_v, rows_k, kv_heads),
        "o": (out_strides, dim_v, rows_q, heads),
    }
    of_keys = name in ("k", "v")
    of_pages = pages and of_keys
    strides, cols, num_rows, heads = tensors[name]
    batches = problem.batch
    if of_pages:
        num_rows, batches = problem.page_size, problem.num_pages
    # A dimension of size 1 has stride 0 in a Problem; a descriptor wants some legal one. Others
    # that have it are expanded: TMA reads the same rows again, as was tried on an H200.
    sizes = (1 if packed and not of_pages else batches, heads, num_rows)
    element_bytes, box_cols = _ELEMENT_BYTES, plan.chunk
    if of_keys:
        element_bytes, box_cols = problem.cache_bytes, plan.load_chunk
    is_swizzled = not (of_keys and plan.converts)  # whoever converts bytes swizzles
    batch_bytes, head_bytes, row_bytes = (
        element_bytes * stride if stride or size > 1 else 16
        for stride, size in zip(strides, sizes, strict=True)
    )
    tensor_map = TensorMap(
        base=pointers.get("out" if name == "o" else name) or 0,
        row_stride_bytes=row_bytes,
        head_stride_bytes=head_bytes,
        batch_stride_bytes=batch_bytes,
        cols=cols,
        rows=num_rows,
        heads=heads,
        batches=batches,
        box_cols=box_cols,
        box_rows=plan.box_rows if of_keys else plan.rows_of_group,
        element_bytes=element_bytes,
        swizzle_bytes=box_cols * element_bytes if is_swizzled else 0,
    )
    if packed and plan.folds_heads and not of_keys:
        fold_boxes(tensor_map, plan.folds_heads)
    whole_rows = of_pages and plan.whole_rows
    if whole_rows:
        tensor_map.chunks, tensor_map.cols = cols // box_cols, box_cols
    if packed and not of_pages:
        make_ragged(tensor_map, 0)
    elif whole_rows and name == "k":
        argument.attn.k_rows_per_batch = batch_bytes // row_bytes if strides[0] else 0
        group_rows(tensor_map, argument.attn.k_rows_per_batch)
    elif (problem.varlen == "keys" and of_keys) or (pages and name == "v"):
        rows_per_batch = batch_bytes // row_bytes if strides[0] else 0
        setattr(argument.attn, f"{name}_rows_per_batch", rows_per_batch)
        last_begin = (batches - 1) * rows_per_batch
        if pages:  # of which a box may begin in the middle
            last_begin += num_rows - plan.box_rows
            tensor_map.rows = plan.box_rows
        make_ragged(tensor_map, last_begin)
    setattr(argument, f"{name}_map", tensor_map)


def fold_boxes(tensor_map: TensorMap, num_heads: int) -> None:
    """Let a box of packed rows be all of `num_heads` heads of as many queries as 64 rows have: the
    heads of a query follow one another, so heads take the place of rows, and rows that of heads."""
    m = tensor_map
    m.rows, m.heads = m.heads, m.rows
    m.row_stride_bytes, m.head_stride_bytes = m.head_stride_bytes, m.row_stride_bytes
    m.box_rows, m.box_heads = num_heads, ROWS_OF_CONSUMER // num_heads


def group_rows(tensor_map: TensorMap, rows_per_page: int) -> None:
    """Let a box of a page be groups of eight rows, each with all chunks of columns: what was a page
    becomes such a group, counted over all pages, which begin `rows_per_page` rows apart."""
    m = tensor_map
    m.batches = ((m.batches - 1) * rows_per_page + m.rows) // PAGE_ROWS
    m.batch_stride_bytes = PAGE_ROWS * m.row_stride_bytes
    m.box_batches = m.box_rows // PAGE_ROWS
    m.rows = m.box_rows = PAGE_ROWS


def make_ragged(tensor_map: TensorMap, last_begin: int) -> None:
    """Let boxes end where a sequence ends, though its end is known to the device alone.

    Rows and batches get the same stride, and the map starts `rows` rows before its tensor. Row i of
    a sequence of `length` rows that starts at row `begin` (at most `last_begin` + `rows`) then has
    two coordinates: rows - length + i, which from i = length on is outside of the map, where TMA
    reads zeros and writes nothing; and begin + length, which takes the first one's offset back:

        base - rows * stride + (rows - length + i) * stride + (begin + length) * stride

    The map's base is no address of the tensor's. An H200 faults on a box of such a map that starts
    behind the last row, where it would only give zeros of another: no box may start there.

    Where a box has several heads, heads and rows have changed places, see `fold_boxes`.
    """
    m = tensor_map
    rows, stride_bytes = m.rows, m.row_stride_bytes
    if m.box_heads:
        rows, stride_bytes = m.heads, m.head_stride_bytes
    m.base = (m.base - rows * stride_bytes) % 2**64
    m.batch_stride_bytes = stride_bytes
    m.batches = last_begin + rows + 1
