"""Launch the kernels that merge two results of attention; what depends on the description of
tensors alone is prepared once."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from flashcore.base import forks
from flashcore.compile.codegen import generate_source
from flashcore.compile.jit import compile_source
from flashcore.kernels.merge.params import (
    MergeBackwardTensors,
    MergePlan,
    MergeTensors,
    build_params,
    grid_size,
    make_plan,
    pointer_field,
)
from flashcore.launch.driver_launch import Argument, Launch
from flashcore.problem.problem import arch_of_device
from flashcore.problem.validation import DTYPES

PREPARED_MAX = 1024  # descriptions that are remembered

_lock = forks.lock()


class _Prepared(NamedTuple):
    """Hold a launch, its argument without addresses, and where these go."""

    launch: Launch
    content: bytes
    offsets: tuple[int, ...]


_prepared: dict[object, _Prepared] = {}


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
        with _lock:
            while len(_prepared) >= PREPARED_MAX:
                del _prepared[next(iter(_prepared))]  # the oldest
            _prepared[key] = found
    memory = ctypes.create_string_buffer(found.content, len(found.content))
    for offset, address in zip(found.offsets, addresses, strict=True):
        ctypes.c_uint64.from_buffer(memory, offset).value = address
    found.launch(Argument(memory))


def _prepare(tensors: MergeTensors | MergeBackwardTensors, index: int, dtype_out: str) -> _Prepared:
    is_backward = hasattr(tensors, "dout_a")
    kernel = "merge_results_backward" if is_backward else "merge_results"
    plan, params = make_plan(kernel, tensors, dtype_out), build_params(tensors)
    launch = _launch(plan, arch_of_device(index), index, grid_size(params, plan))
    offsets = tuple(_offset_of(type(params), pointer_field(name)) for name in tensors._fields)
    return _Prepared(launch, bytes(params), offsets)


def _offset_of(struct: type[ctypes.Structure], field: str) -> int:
    """Return where a field lies; a dot leads into a member."""
    name, _, inner = field.partition(".")
    offset = int(getattr(struct, name).offset)
    members = {member: kind for member, kind, *_ in struct._fields_}
    return offset + _offset_of(members[name], inner) if inner else offset  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _launch(plan: MergePlan, arch: int, index: int, grid: int) -> Launch:
    source = generate_source(plan)  # type: ignore[arg-type]
    kernel = compile_source(source, arch, plan.kernel, "", f"{plan.describe()}, sm_{arch}")
    device = torch.device("cuda", index)
    return Launch(kernel, grid=grid, num_threads=plan.num_threads, smem_bytes=0, device=device)
