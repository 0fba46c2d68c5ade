"""Encode TMA descriptors as the GPU reads them: made by the driver, and given other addresses."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any

from flashcore.kernels.tensor_map import TensorMap
from flashcore.launch.driver import INVALID_CONTEXT, bind_context, check, entry_point, pointer

ALIGNMENT = 64  # of a descriptor that the driver writes, in bytes
_DATA_TYPES = {"float16": 6, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_...
_UINT8 = 0  # only the size counts
_SWIZZLES = {0: 0, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_... by bytes
# With 256 reading a long cache once takes 7 % longer (docs/ladder-decoding.md).
_L2_PROMOTION_128B = 2
_MOST_DIMS = 5
_Sizes, _Strides = ctypes.c_uint64 * _MOST_DIMS, ctypes.c_uint64 * (_MOST_DIMS - 1)
_Box = ctypes.c_uint32 * _MOST_DIMS
_EVERY_ELEMENT = _Box(1, 1, 1, 1, 1)


def aligned(content: bytes) -> tuple[Any, int]:
    """Return memory that holds `content`, and the address in it where it does, a multiple of
    ALIGNMENT."""
    memory = _buffer(len(content) + ALIGNMENT)()
    address = ctypes.addressof(memory) + ALIGNMENT - 1 & -ALIGNMENT
    ctypes.memmove(address, content, len(content))
    return memory, address


@functools.cache
def _buffer(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * size


def encode(tensor_map: TensorMap, dtype_name: str) -> TensorMap:
    """Return the descriptor that the GPU reads, of a "float16" or "bfloat16" tensor, or of bytes
    where elements have one.

    Raises:
        FlashCoreError: the driver refuses; the message holds its status.
    """
    m = tensor_map
    memory, address = aligned(bytes(tensor_map))
    sizes, strides = [m.cols, m.rows], [m.row_stride_bytes]
    box = [m.box_cols, m.box_rows]
    if m.chunks:
        sizes.append(m.chunks)
        strides.append(m.box_cols * m.element_bytes)
        box.append(m.chunks)
    sizes += m.heads, m.batches
    strides += m.head_stride_bytes, m.batch_stride_bytes
    box += max(1, m.box_heads), max(1, m.box_batches)
    arguments = (
        pointer(address),
        _UINT8 if m.element_bytes == 1 else _DATA_TYPES[dtype_name],
        len(sizes),
        pointer(m.base),
        _Sizes(*sizes),
        _Strides(*strides),
        _Box(*box),
        _EVERY_ELEMENT,
        0,  # not interleaved
        _SWIZZLES[m.swizzle_bytes],
        _L2_PROMOTION_128B,
        0,  # zeros out of bounds
    )
    status = entry_point("cuTensorMapEncodeTiled")(*arguments)
    if status:
        _retry(status, "cuTensorMapEncodeTiled", *arguments)
    return TensorMap.from_buffer_copy(memory, address - ctypes.addressof(memory))


_KINDS_MAX = 4096
_kinds: dict[tuple[bytes, str], TensorMap] = {}


def encode_kind(tensor_map: TensorMap, dtype_name: str) -> TensorMap:
    """Return a descriptor for `readdress`, encoded once for all tensors of the same kind: k and v
    are often of one, and while keys are appended q and out stay of theirs."""
    key = bytes(tensor_map)[TensorMap.row_stride_bytes.offset :], dtype_name
    found = _kinds.get(key)
    if found is None:
        if len(_kinds) >= _KINDS_MAX:
            _kinds.clear()
        found = _kinds[key] = encode(tensor_map, dtype_name)
    return found


def readdress(address: int, bases: Iterable[tuple[int, int]]) -> None:
    """Give descriptors other tensors of the same kind, for much less than encoding them.

    Args:
        address: where the first is, a multiple of ALIGNMENT.
        bases: for each descriptor its offset from `address`, a multiple of ALIGNMENT, and the
            tensor's address.

    Raises:
        FlashCoreError: the driver refuses; the message holds its status.
    """
    replace, argument = entry_point("cuTensorMapReplaceAddress"), ctypes.c_void_p.from_param
    for offset, base in bases:
        status = replace(argument(address + offset), argument(base))
        if status:
            _retry(status, "cuTensorMapReplaceAddress", pointer(address + offset), pointer(base))


def _retry(status: int, name: str, *arguments: Any) -> None:
    if status == INVALID_CONTEXT:
        bind_context()
        status = entry_point(name)(*arguments)
    check(status, name)
