"""Merge two results of attention on a GPU, and compute the gradients, by one kernel each. What
depends on the description of tensors alone is prepared once."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from flashcore.errors import BackendUnavailableError, notice_once
from flashcore.kernels.merge.params import (
    BFLOAT16_MIN_ARCH,
    MIN_ARCH,
    ROWS_MAX,
    MergeBackwardTensors,
    MergeTensors,
    as_rows,
    build_params,
    grid_size,
    make_plan,
    new_like,
    pointer_field,
)
from flashcore.launch.driver_launch import Argument, Launch
from flashcore.launch.single_call import load, remember
from flashcore.problem.problem import arch_of_device
from flashcore.problem.validation import DTYPES

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Prepared(NamedTuple):
    """Hold a launch, its argument without addresses, and where these go."""

    launch: Launch
    content: bytes
    offsets: tuple[int, ...]


_prepared: dict[object, _Prepared] = {}


def merge_on_gpu(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Return out and lse over both sets of keys, contiguous, or None where there is no kernel; see
    `flashcore.merge`."""
    if not has_kernel(out_a, out_b, lse_a, out_dtype):
        return None
    sides = as_rows(out_a, True), as_rows(out_b, True), as_rows(lse_a, False), as_rows(lse_b, False)
    out = torch.empty(out_a.shape, dtype=out_dtype, device=out_a.device)
    lse = new_like(lse_a)
    tensors = MergeTensors(*sides, as_rows(out, True), as_rows(lse, False))
    return (out, lse) if launched(tensors, out_dtype) else None


def merge_backward_on_gpu(
    dout: Tensor | None, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor,
    lse_b: Tensor, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Return the gradients of out_a, lse_a, out_b and lse_b, or None where there is no kernel.

    Args:
        dout: what arrives at out, or None for zero.
        dlse: what arrives at lse, or None for zero.
        out_a: as the forward was given it, like those that follow.
        lse_a: of out_a.
        out_b: over the other keys.
        lse_b: of out_b.
        out_dtype: of out.
    """
    if not has_kernel(out_a, out_b, lse_a, out_dtype):
        return None
    dout_a, dout_b, dlse_a, dlse_b = (new_like(x) for x in (out_a, out_b, lse_a, lse_b))
    tensors = MergeBackwardTensors(
        as_rows(out_a, True), as_rows(out_b, True), as_rows(lse_a, False), as_rows(lse_b, False),
        None if dout is None else as_rows(dout, True),
        None if dlse is None else as_rows(dlse, False),
        as_rows(dout_a, True), as_rows(dout_b, True), as_rows(dlse_a, False),
        as_rows(dlse_b, False),
    )  # fmt: skip
    return (dout_a, dlse_a, dout_b, dlse_b) if launched(tensors, out_dtype) else None


def has_kernel(out_a: Tensor, out_b: Tensor, lse: Tensor, out_dtype: torch.dtype) -> bool:
    """Return whether the kernels take such tensors on their GPU."""
    dtypes = out_a.dtype, out_b.dtype, out_dtype
    lowest = BFLOAT16_MIN_ARCH if torch.bfloat16 in dtypes else MIN_ARCH
    return (
        out_a.is_cuda
        and all(dtype in _KERNEL_DTYPES for dtype in dtypes)
        and lse.dtype == torch.float32
        and out_a.numel() > 0
        and lse.numel() < ROWS_MAX
        and arch_of_device(out_a.device.index) >= lowest
    )


def launched(tensors: MergeTensors | MergeBackwardTensors, out_dtype: torch.dtype) -> bool:
    """Launch the kernel; return False where it cannot be compiled, and say so once."""
    try:
        launch_merge(tensors, out_dtype)
    except BackendUnavailableError as error:
        notice_once("merge", f"PyTorch merges results, which takes more launches: {error}")
        return False
    return True


def launch_merge(tensors: MergeTensors | MergeBackwardTensors, dtype_out: torch.dtype) -> None:
    """Merge on the GPU, or compute the gradients, on the current stream, without waiting for it.

    Args:
        tensors: on one GPU.
        dtype_out: of out.

    Raises:
        CompileError, BackendUnavailableError, FlashCoreError: see jit.compile_source, Launch.
    """
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    index = tensors.out_a.device.index
    description = tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors])
    key = index, dtype_out, description, tuple([address % 16 for address in addresses])
    found = _prepared.get(key)
    if found is None:
        found = _prepare(tensors, index, DTYPES[dtype_out])
        remember(_prepared, key, found)
    memory = ctypes.create_string_buffer(found.content, len(found.content))
    for offset, address in zip(found.offsets, addresses, strict=True):
        ctypes.c_uint64.from_buffer(memory, offset).value = address
    found.launch(Argument(memory))


def _prepare(tensors: MergeTensors | MergeBackwardTensors, index: int, dtype_out: str) -> _Prepared:
    is_backward = hasattr(tensors, "dout_a")
    kernel = "merge_results_backward" if is_backward else "merge_results"
    plan, params = make_plan(kernel, tensors, dtype_out), build_params(tensors)
    launch = load(plan, arch_of_device(index), index, grid_size(params, plan))
    offsets = tuple(_offset_of(type(params), pointer_field(name)) for name in tensors._fields)
    return _Prepared(launch, bytes(params), offsets)


def _offset_of(struct: type[ctypes.Structure], field: str) -> int:
    """Return where a field lies; a dot leads into a member."""
    name, _, inner = field.partition(".")
    offset = int(getattr(struct, name).offset)
    members = {member: kind for member, kind, *_ in struct._fields_}
    return offset + _offset_of(members[name], inner) if inner else offset  # type: ignore[arg-type]
