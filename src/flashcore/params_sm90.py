"""Arguments of the Hopper kernel: TMA descriptors and launch parameters."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Literal

from flashcore.driver import import_driver
from flashcore.errors import FlashCoreError
from flashcore.params import AttnGateParams, AttnParams, build_params, place
from flashcore.plan_sm90 import Sm90Plan
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
        ("num_heads_and_batches", ctypes.c_int32),
        ("padding", ctypes.c_uint8 * (-(ctypes.sizeof(AttnParams) + 4) % 64)),
    ]


class AttnSm90GateParams(ctypes.Structure):
    """AttnSm90Params of a kernel that was built with a debug gate."""

    _fields_ = [
        *AttnSm90Params._fields_[:4],
        ("attn", AttnGateParams),
        ("num_heads_and_batches", ctypes.c_int32),
        ("padding", ctypes.c_uint8 * (-(ctypes.sizeof(AttnGateParams) + 4) % 64)),
    ]


def encode_tensor_map(tensor_map: TensorMap, dtype_name: str) -> TensorMap:
    """The descriptor that the GPU reads, from the driver, of a "float16" or "bfloat16" tensor."""
    without_base = ctypes.string_at(ctypes.addressof(tensor_map) + 8, 56)
    encode, before, after = _encoding(without_base, dtype_name)
    status, encoded = encode(*before, tensor_map.base, *after)
    if int(status) != 0:
        raise FlashCoreError(f"cuTensorMapEncodeTiled failed: {status!r}")
    return TensorMap.from_buffer_copy(
        ctypes.string_at(int(encoded.getPtr()), ctypes.sizeof(TensorMap))
    )


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


def num_units(problem: Problem, plan: Sm90Plan) -> int:
    """Units of work that persistent blocks stride over (tile/schedule_sm90.cuh): row tiles, or
    pairs of them."""
    num_m_blocks = -(-problem.seqlen_q // plan.block_m)
    return -(-num_m_blocks // plan.tiles_per_unit) * problem.num_heads_q * problem.batch


def grid_size(problem: Problem, plan: Sm90Plan, num_sms: int) -> int:
    """As many blocks as run at once on a GPU with `num_sms` multiprocessors."""
    return min(num_units(problem, plan), num_sms * plan.min_blocks)


def build_params_sm90(
    problem: Problem,
    plan: Sm90Plan,
    pointers: dict[str, int | None],
    target: Literal["ptx", "host"] = "ptx",
) -> AttnSm90Params | AttnSm90GateParams:
    """The kernel's argument.

    Args:
        problem: shapes, strides and options.
        plan: tiles and gate.
        pointers: address by field name, see params.build_params.
        target: "ptx" encodes the descriptors for the GPU, "host" for the simulator.

    Returns:
        The filled structure.

    Raises:
        NotImplementedError: the problem is too large for one launch.
    """
    params = AttnSm90Params() if plan.gate is None else AttnSm90GateParams()
    params.attn = build_params(problem, plan, pointers)
    params.num_heads_and_batches = problem.num_heads_q * problem.batch
    rows, kv_heads = problem.num_heads_q * problem.seqlen_q, problem.num_heads_kv
    out_strides = (rows * problem.head_dim_v, problem.seqlen_q * problem.head_dim_v)
    tensors: dict[str, tuple[Any, ...]] = {
        "q": (problem.q_strides, problem.head_dim, problem.seqlen_q, problem.num_heads_q),
        "k": (problem.k_strides, problem.head_dim, problem.seqlen_k, kv_heads),
        "v": (problem.v_strides, problem.head_dim_v, problem.seqlen_k, kv_heads),
        "o": (
            (*out_strides, problem.head_dim_v),
            problem.head_dim_v,
            problem.seqlen_q,
            problem.num_heads_q,
        ),
    }
    box_rows = {"q": plan.block_m, "k": plan.block_n, "v": plan.block_n, "o": 64}
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
        setattr(params, f"{name}_map", tensor_map)
    return params if target == "host" else _encoded(params, problem.dtype)


def place_sm90(
    template: AttnSm90Params | AttnSm90GateParams, pointers: dict[str, int | None], dtype_name: str
) -> AttnSm90Params | AttnSm90GateParams:
    """What build_params_sm90 makes for the GPU, from what it made for the simulator, with other
    addresses by field name."""
    params = type(template).from_buffer_copy(template)
    params.attn = place(template.attn, pointers)
    for name in _MAPS:
        getattr(params, f"{name}_map").base = pointers["out" if name == "o" else name]
    return _encoded(params, dtype_name)


def _encoded(
    params: AttnSm90Params | AttnSm90GateParams, dtype_name: str
) -> AttnSm90Params | AttnSm90GateParams:
    for name in _MAPS:
        tensor_map = getattr(params, f"{name}_map")
        setattr(params, f"{name}_map", encode_tensor_map(tensor_map, dtype_name))
    return params
