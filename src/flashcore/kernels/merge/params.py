"""Describe the kernels that merge two results of attention: their variants, and their arguments,
mirrors of the structs in merge_rows.cuh, merge_results.cuh and merge_results_backward.cuh."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.problem.validation import DTYPES

WARPS = 4  # of a block; MERGE_WARPS in merge_rows.cuh
MIN_ARCH = 75
BFLOAT16_MIN_ARCH = 80
ROWS_MAX = 2**31 - 256  # numbered in 32 bits, blocks that are not full included
_ELEMENTS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float"}
_PACKET_BYTES = 16
_PACKET_ELEMENTS = 8  # of the narrower dtypes


class MergeTensors(NamedTuple):
    """Hold what the kernel reads and writes: [batch, head, row, dim], and [batch, head, row] of
    lse, all float32. Columns are contiguous; out and lse entirely.

    Args:
        out_a: over some keys.
        out_b: over the others.
        lse_a: of out_a.
        lse_b: of out_b.
        out: written.
        lse: written.
    """

    out_a: Tensor
    out_b: Tensor
    lse_a: Tensor
    lse_b: Tensor
    out: Tensor
    lse: Tensor


class MergeBackwardTensors(NamedTuple):
    """Hold what the kernel of the gradients reads and writes; see MergeTensors.

    Args:
        out_a: as the forward was given it, like the three that follow.
        out_b: over the other keys.
        lse_a: of out_a.
        lse_b: of out_b.
        dout: what arrives at out, or None for zero.
        dlse: what arrives at lse, or None for zero.
        dout_a: written, contiguous, like the three that follow.
        dout_b: written.
        dlse_a: written.
        dlse_b: written.
    """

    out_a: Tensor
    out_b: Tensor
    lse_a: Tensor
    lse_b: Tensor
    dout: Tensor | None
    dlse: Tensor | None
    dout_a: Tensor
    dout_b: Tensor
    dlse_a: Tensor
    dlse_b: Tensor


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A MergePlan says which variant of the kernels computes a call.

    Args:
        kernel: "merge_results" or "merge_results_backward".
        dtype_a: of out_a: "float16", "bfloat16" or "float32".
        dtype_b: of out_b.
        dtype_out: of out.
        width: elements of a lane at a time, 8 (16 bytes, or twice as many) or 1.
        lanes: of a row, a power of two up to 32.
    """

    kernel: str
    dtype_a: str
    dtype_b: str
    dtype_out: str
    width: int
    lanes: int

    gate = None
    num_threads = 32 * WARPS
    starts_early = False

    @property
    def params_struct(self) -> str:
        """Return the name of the kernel's parameter struct."""
        return "MergeBackwardParams" if self.kernel.endswith("_backward") else "MergeParams"

    @property
    def rows_of_block(self) -> int:
        """Return the rows that a block computes."""
        return self.num_threads // self.lanes

    def constants(self) -> dict[str, object]:
        """Return the constants of the source text."""
        return {
            "ElementA": _ELEMENTS[self.dtype_a],
            "ElementB": _ELEMENTS[self.dtype_b],
            "ElementOut": _ELEMENTS[self.dtype_out],
            "WIDTH": self.width,
            "LANES": self.lanes,
        }

    def describe(self) -> str:
        """Return what the kernel is, for people."""
        dtypes = f"{self.dtype_a}, {self.dtype_b} to {self.dtype_out}"
        return f"{self.kernel} {dtypes}, {self.lanes} lanes of {self.width}"


class MergeStrides(ctypes.Structure):
    """Hold the strides of a tensor's batch, head and row, in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]

    @classmethod
    def of(cls, x: Tensor | None) -> MergeStrides:
        """Return those of a tensor; 0 of none."""
        return cls(0, 0, 0) if x is None else cls(*x.stride()[:3])


_SIDES = ("out_a", "out_b", "lse_a", "lse_b")


class MergeSides(ctypes.Structure):
    """Mirror `struct MergeSides`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _SIDES),
        *((f"{name}_strides", MergeStrides) for name in _SIDES),
        *((name, ctypes.c_int32) for name in ("num_rows", "num_heads", "rows_of_head", "dim")),
    ]


class MergeParams(ctypes.Structure):
    """Mirror `struct MergeParams`, field by field."""

    _fields_ = [("sides", MergeSides), ("out", ctypes.c_void_p), ("lse", ctypes.c_void_p)]


class MergeBackwardParams(ctypes.Structure):
    """Mirror `struct MergeBackwardParams`, field by field."""

    _fields_ = [
        ("sides", MergeSides),
        ("dout", ctypes.c_void_p),
        ("dlse", ctypes.c_void_p),
        ("dout_strides", MergeStrides),
        ("dlse_strides", MergeStrides),
        *((name, ctypes.c_void_p) for name in ("dout_a", "dout_b", "dlse_a", "dlse_b")),
    ]


def as_rows(x: Tensor, has_columns: bool) -> Tensor:
    """Return a tensor as the kernels take it: with three dimensions of rows, the columns
    contiguous. It is copied where it cannot be viewed so.

    Args:
        x: out, [..., dim], or lse, [...], of any number of dimensions.
        has_columns: whether it is out.
    """
    leading = x.dim() - has_columns
    if leading > 3:
        x = x.reshape(-1, *x.shape[leading - 2 :])
    elif leading < 3:
        x = x[(None,) * (3 - leading)]
    return x if not has_columns or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def make_plan(kernel: str, x: MergeTensors | MergeBackwardTensors, dtype_out: str) -> MergePlan:
    """Return the plan of tensors: by packets where all of them can be read and written so."""
    dim = x.out_a.shape[-1]
    of_columns = ("out_a", "out_b", "out", "dout", "dout_a", "dout_b")
    outs = [t for name, t in x._asdict().items() if t is not None and name in of_columns]
    width = _PACKET_ELEMENTS if dim % _PACKET_ELEMENTS == 0 and _are_aligned(outs) else 1
    lanes = 1
    while lanes < 32 and lanes * width < dim:
        lanes *= 2
    return MergePlan(kernel, DTYPES[x.out_a.dtype], DTYPES[x.out_b.dtype], dtype_out, width, lanes)


def _are_aligned(tensors: Iterable[Tensor]) -> bool:
    """Return whether every row starts at a multiple of 16 bytes."""
    return all(
        x.data_ptr() % _PACKET_BYTES == 0
        and all(
            size == 1 or stride * x.element_size() % _PACKET_BYTES == 0
            for size, stride in zip(x.shape[:3], x.stride(), strict=False)
        )
        for x in tensors
    )


def build_params(x: MergeTensors | MergeBackwardTensors) -> MergeParams | MergeBackwardParams:
    """Return the kernel's argument, without addresses."""
    batch, num_heads, rows_of_head, dim = x.out_a.shape
    strides = {f"{name}_strides": MergeStrides.of(getattr(x, name)) for name in _SIDES}
    sides = MergeSides(
        **strides,
        num_rows=batch * num_heads * rows_of_head,
        num_heads=num_heads,
        rows_of_head=rows_of_head,
        dim=dim,
    )
    if isinstance(x, MergeTensors):
        return MergeParams(sides=sides)
    arriving: dict[str, Any] = {
        f"{name}_strides": MergeStrides.of(getattr(x, name)) for name in ("dout", "dlse")
    }
    return MergeBackwardParams(sides=sides, **arriving)


def pointer_field(name: str) -> str:
    """Return the field of the argument that holds a tensor's address."""
    return f"sides.{name}" if name in _SIDES else name


def grid_size(params: MergeParams | MergeBackwardParams, plan: MergePlan) -> int:
    """Return the number of blocks."""
    return -(-int(params.sides.num_rows) // plan.rows_of_block)


def new_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new contiguous tensor of a shape."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
