"""Launch the kernel that appends to a cache; what depends on the description of tensors alone is
prepared once."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from flashcore.errors import BackendUnavailableError
from flashcore.kernels.append.params import (
    HEADS_MAX,
    AppendPlan,
    AppendTensors,
    append_grid_size,
    build_append_params,
)
from flashcore.launch.driver_launch import Argument, Launch
from flashcore.launch.single_call import load, remember

_POINTERS = struct.Struct(f"{len(AppendTensors._fields)}Q")


class _Prepared(NamedTuple):
    """Hold a launch, and the bytes of its argument behind the addresses."""

    launch: Launch
    content: bytes


_prepared: dict[object, _Prepared] = {}


def launch_append(plan: AppendPlan, arch: int, tensors: AppendTensors, queries: str) -> None:
    """Append on the GPU, on the current stream, without waiting for it.

    Args:
        plan: the variant.
        arch: of the GPU, 90 for sm_90.
        tensors: on one GPU.
        queries: where queries stand, of QUERIES.

    Raises:
        BackendUnavailableError: too many tokens for one launch; else as jit.compile_source.
        CompileError, FlashCoreError: see jit.compile_source, Launch.
    """
    description = tuple([None if x is None else (x.shape, x.stride()) for x in tensors])
    index = tensors.k_cache.device.index
    key = plan, index, queries, description
    found = _prepared.get(key)
    if found is None:
        found = _prepare(plan, arch, index, tensors, queries)
        remember(_prepared, key, found)
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    content = _POINTERS.pack(*addresses) + found.content
    found.launch(Argument(ctypes.create_string_buffer(content, len(content))))


def _prepare(
    plan: AppendPlan, arch: int, index: int, tensors: AppendTensors, queries: str
) -> _Prepared:
    heads = max(0 if x is None else x.numel() // x.shape[-1] for x in (tensors.q, tensors.k_new))
    if heads > HEADS_MAX:
        raise BackendUnavailableError(
            f"{heads} heads of all tokens are more than one launch moves, {HEADS_MAX}"
        )
    params = build_append_params(tensors, queries)
    launch = load(plan, arch, index, append_grid_size(params))
    return _Prepared(launch, bytes(params)[_POINTERS.size :])
