"""A tensor map says how TMA reads boxes of a tensor: the argument of the kernels for Hopper."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable


class TensorMap(ctypes.Structure):
    """A TensorMap holds a tensor and its boxes as the simulator's TMA reads them; on a GPU the
    driver's own opaque encoding takes the same 128 bytes."""

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
        ("box_heads", ctypes.c_uint32),  # 0 as 1
        ("chunks", ctypes.c_uint32),  # of box_cols columns, between rows and heads; 0: no such
        ("box_batches", ctypes.c_uint32),  # 0 as 1; each with all chunks
        ("unused", ctypes.c_uint8 * 52),
    ]


def encode_maps(
    argument: ctypes.Structure,
    dtype_name: str,
    encode: Callable[[TensorMap, str], TensorMap],
    names: Iterable[str],
) -> None:
    """Replace the simulator's tensor maps in a kernel's argument, `NAME_map` of each of `names`, by
    what `encode` makes of them."""
    for name in names:
        field = f"{name}_map"
        setattr(argument, field, encode(getattr(argument, field), dtype_name))
