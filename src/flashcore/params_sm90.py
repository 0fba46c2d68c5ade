"""Arguments of the Hopper kernel: TMA descriptors and launch parameters."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, Literal

from flashcore import params
from flashcore.driver import bind_context, import_driver
from flashcore.errors import FlashCoreError
from flashcore.folding import as_launched
from flashcore.params import AttnGateParams, AttnParams
from flashcore.plan_sm90 import ROWS_OF_CONSUMER, Sm90Plan
from flashcore.problem import Problem

_ELEMENT_BYTES = 2
_MAPS = ("q", "k", "v", "o")


class TensorMap(ctypes.Structure):
    """A tensor and its boxes as the simulator's TMA reads them; on a GPU the driver's own opaque
    encoding takes the same 128 bytes."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("row_stride_bytes", ctypes.c_uint64),
        ("head_stride_bytes", ctypes.c_uint64),
        ("batch_stride_bytes", ctypes.c_uint64),
        ("cols", ctypes.c_uint32),
        ("rows", ctypes.c_uint32),
        ("heads", ctypes.c_uint32),
        ("batches", ctypes.c_uint32),
        ("box_cols", ctypes.c_uint32),
        ("box_rows", ctypes.c_uint32),
        ("element_bytes", ctypes.c_uint32),
        ("swizzle_bytes", ctypes.c_uint32),
        ("unused", ctypes.c_uint8 * 64),
    ]


class AttnSm90Params(ctypes.Structure):
    """Mirror of `struct AttnSm90Params` in kernels/attn_fwd_sm90.cuh; 64-byte aligned there."""

    _fields_ = [
        ("q_map", TensorMap),
        ("k_map", TensorMap),
        ("v_map", TensorMap),
        ("o_map", TensorMap),
        ("attn", AttnParams),
        ("num_heads", ctypes.c_int32),
        ("heads_per_group", ctypes.c_int32),
        ("padding", ctypes.c_uint8 * (-(ctypes.sizeof(AttnParams) + 8) % 64)),
    ]


class AttnSm90GateParams(ctypes.Structure):
    """AttnSm90Params of a kernel that was built with a debug gate."""

    _fields_ = [
        *AttnSm90Params._fields_[:4],
        ("attn", AttnGateParams),
        *AttnSm90Params._fields_[5:7],
        ("padding", ctypes.c_uint8 * (-(ctypes.sizeof(AttnGateParams) + 8) % 64)),
    ]


def encode_tensor_map(tensor_map: TensorMap, dtype_name: str) -> TensorMap:
    """The descriptor that the GPU reads, from the driver, of a "float16" or "bfloat16" tensor."""
    result = TensorMap.from_buffer_copy(tensor_map)
    _encode(ctypes.addressof(result), dtype_name)
    return result


def _encode(address: int, dtype_name: str) -> None:
    """Puts the descriptor that the GPU reads in the place of a TensorMap."""
    without_base = ctypes.string_at(address + 8, 56)
    encode, before, after = _encoding(without_base, dtype_name)
    base = ctypes.c_uint64.from_address(address).value
    status, encoded = encode(*before, base, *after)
    if status == import_driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:
        bind_context()
        status, encoded = encode(*before, base, *after)
    if status:
        raise FlashCoreError(f"cuTensorMapEncodeTiled failed: {status!r}")
    ctypes.memmove(address, int(encoded.getPtr()), ctypes.sizeof(TensorMap))


@functools.lru_cache(maxsize=4096)
def _encoding(without_base: bytes, dtype_name: str) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """cuTensorMapEncodeTiled, and its arguments before and after the address."""
    driver = import_driver()
    dtype = driver.CUtensorMapDataType
    swizzle = driver.CUtensorMapSwizzle
    m = TensorMap.from_buffer_copy(bytes(8) + without_base + bytes(64))
    before = (
        dtype.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        if dtype_name == "float16"
        else dtype.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        4,
    )
    after = (
        [driver.cuuint64_t(size) for size in (m.cols, m.rows, m.heads, m.batches)],
        [
            driver.cuuint64_t(stride)
            for stride in (m.row_stride_bytes, m.head_stride_bytes, m.batch_stride_bytes)
        ],
        [driver.cuuint32_t(size) for size in (m.box_cols, m.box_rows, 1, 1)],
        [driver.cuuint32_t(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B
        if m.swizzle_bytes == 128
        else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return driver.cuTensorMapEncodeTiled, before, after


def num_row_tiles(problem: Problem, plan: Sm90Plan) -> int:
    """Row tiles of all heads; of packed sequences as many as there can be."""
    if problem.varlen == "packed":
        return params.grid_size(problem, plan)
    problem = as_launched(problem, plan)
    return -(-problem.seqlen_q // plan.block_m) * problem.num_heads_q * problem.batch


def num_pieces(problem: Problem, plan: Sm90Plan) -> int:
    """What blocks take one after the other: row tiles, or parts of their keys."""
    return num_row_tiles(problem, plan) * plan.num_splits


def grid_size(problem: Problem, plan: Sm90Plan, num_sms: int) -> int:
    """As many blocks as run at once on a GPU with `num_sms` multiprocessors."""
    return min(num_pieces(problem, plan), num_sms * plan.min_blocks)


def split_shapes(problem: Problem, plan: Sm90Plan) -> dict[str, tuple[int, ...]]:
    """What blocks that share the keys of row tiles need, by field of AttnParams
    (tile/split_sm90.cuh): their shares, float32, and counters, int32, 0 between launches."""
    p = as_launched(problem, plan)
    rows = (plan.num_splits, p.batch, p.num_heads_q, p.seqlen_q)
    num_groups = num_row_tiles(problem, plan) * (plan.block_m // ROWS_OF_CONSUMER)
    return {
        "split_out": (*rows, -(-p.head_dim_v // plan.chunk) * plan.chunk),
        "split_stats": (*rows, 2),
        "tile_counter": (num_groups,),
    }


def split_floats(problem: Problem, plan: Sm90Plan) -> tuple[int, int]:
    """Elements of split_out, and of all shares: on a GPU split_stats lies behind split_out."""
    shapes = split_shapes(problem, plan)
    num_out = math.prod(shapes["split_out"])
    return num_out, num_out + math.prod(shapes["split_stats"])


# What K and V of a group of heads may take of L2: 50 MB on an H100 or H200, of which each half
# keeps a copy of what its SMs read; two groups are under way at a time, and q and out pass through.
# On an H100 16 MiB take 1 to 6 % longer at S512 to S2048, and as long beyond (docs/ladder.md).
_GROUP_BYTES = 8 << 20


def heads_per_group(problem: Problem, plan: Sm90Plan, num_blocks: int) -> int:
    """Query heads whose row tiles `num_blocks` blocks draw together under a right bound
    (tile/schedule_sm90.cuh): those of as many heads of K and V as L2 holds, and enough for a row
    tile a block, or the last group would leave many without work."""
    problem = as_launched(problem, plan)
    num_heads = problem.num_heads_q * problem.batch
    heads_of_kv = problem.num_heads_q // problem.num_heads_kv
    bytes_of_kv = _ELEMENT_BYTES * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    tiles_of_kv = heads_of_kv * -(-problem.seqlen_q // plan.block_m)
    num_kv = max(1, _GROUP_BYTES // max(1, bytes_of_kv), round(num_blocks / tiles_of_kv))
    return min(num_heads, heads_of_kv * num_kv)


def build_params_sm90(
    problem: Problem,
    plan: Sm90Plan,
    pointers: dict[str, int | None],
    num_blocks: int,
    target: Literal["ptx", "host"] = "ptx",
) -> AttnSm90Params | AttnSm90GateParams:
    """The kernel's argument.

    Args:
        problem: shapes, strides and options.
        plan: tiles and gate.
        pointers: address by field name, see params.build_params.
        num_blocks: of the launch.
        target: "ptx" encodes the descriptors for the GPU, "host" for the simulator.

    Returns:
        The filled structure.

    Raises:
        NotImplementedError: the problem is too large for one launch.
    """
    packed = problem.varlen == "packed"
    argument = AttnSm90Params() if plan.gate is None else AttnSm90GateParams()
    argument.attn = params.build_params(problem, plan, pointers)
    problem = as_launched(problem, plan)
    argument.attn.num_splits = plan.num_splits
    argument.num_heads = problem.num_heads_q * problem.batch
    argument.heads_per_group = heads_per_group(problem, plan, num_blocks)
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
    box_rows = {"q": ROWS_OF_CONSUMER, "k": plan.block_n, "v": plan.block_n, "o": ROWS_OF_CONSUMER}
    for name, (strides, cols, num_rows, heads) in tensors.items():
        # A dimension of size 1 has stride 0 in a Problem; a descriptor wants some legal one.
        batch_bytes, head_bytes, row_bytes = (
            _ELEMENT_BYTES * stride if stride else 16 for stride in strides
        )
        tensor_map = TensorMap(
            base=pointers.get("out" if name == "o" else name) or 0,
            row_stride_bytes=row_bytes,
            head_stride_bytes=head_bytes,
            batch_stride_bytes=batch_bytes,
            cols=cols,
            rows=num_rows,
            heads=heads,
            batches=problem.batch,
            box_cols=plan.chunk,
            box_rows=box_rows[name],
            element_bytes=_ELEMENT_BYTES,
            swizzle_bytes=plan.chunk * _ELEMENT_BYTES,
        )
        if packed:
            make_ragged(tensor_map, 0)
        elif problem.varlen == "keys" and name in ("k", "v"):
            rows_per_batch = batch_bytes // row_bytes if problem.batch > 1 else 0
            setattr(argument.attn, f"{name}_rows_per_batch", rows_per_batch)
            make_ragged(tensor_map, (problem.batch - 1) * rows_per_batch)
        setattr(argument, f"{name}_map", tensor_map)
    return argument if target == "host" else _encoded(argument, problem.dtype)


def place_sm90(
    template: AttnSm90Params | AttnSm90GateParams, pointers: dict[str, int | None], dtype_name: str
) -> AttnSm90Params | AttnSm90GateParams:
    """What build_params_sm90 makes for the GPU, from what it made for the simulator without
    addresses, with these by field name."""
    argument = type(template).from_buffer_copy(template)
    argument.attn = params.place(template.attn, pointers)
    for name in _MAPS:
        tensor_map = getattr(argument, f"{name}_map")
        address = pointers["out" if name == "o" else name] or 0
        tensor_map.base = (tensor_map.base + address) % 2**64
    return _encoded(argument, dtype_name)


def _encoded(
    argument: AttnSm90Params | AttnSm90GateParams, dtype_name: str
) -> AttnSm90Params | AttnSm90GateParams:
    address = ctypes.addressof(argument)
    for name in _MAPS:
        _encode(address + getattr(type(argument), f"{name}_map").offset, dtype_name)
    return argument


def make_ragged(tensor_map: TensorMap, last_begin: int) -> None:
    """Boxes that end where a sequence ends, though its end is known to the device alone.

    Rows and batches get the same stride, and the map starts `rows` rows before its tensor. Row i of
    a sequence of `length` rows that starts at row `begin` (at most `last_begin` + `rows`) then has
    two coordinates: rows - length + i, which from i = length on is outside of the map, where TMA
    reads zeros and writes nothing; and begin + length, which takes the first one's offset back:

        base - rows * stride + (rows - length + i) * stride + (begin + length) * stride

    The map's base is no address of the tensor's. An H200 faults on a box of such a map that starts
    behind the last row, where it would only give zeros of another: no box may start there.
    """
    m = tensor_map
    m.base = (m.base - m.rows * m.row_stride_bytes) % 2**64
    m.batch_stride_bytes = m.row_stride_bytes
    m.batches = last_begin + m.rows + 1
