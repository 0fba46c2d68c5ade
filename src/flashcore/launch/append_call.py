"""Launch the kernel that appends to a cache; what depends on the description of tensors alone is
prepared once."""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from flashcore.errors import BackendUnavailableError
from flashcore.kernels.append.params import (
    HEADS_MAX,
    AppendPlan,
    AppendTensors,
    append_grid_size,
    build_append_params,
)
from flashcore.launch.allocation import allocator
from flashcore.launch.driver_launch import Argument, Launch
from flashcore.launch.single_call import load, remember
from flashcore.launch.types import Addresses

_POINTERS = struct.Struct(f"{len(AppendTensors._fields)}Q")
_ALIGNMENT = 16  # in bytes, of what one allocation holds side by side


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
    found = _prepared_for(plan, arch, tensors, queries)
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    content = _POINTERS.pack(*addresses) + found.content
    found.launch(Argument(ctypes.create_string_buffer(content, len(content))))


class AppendCall:
    """An AppendCall is a launch that appends, ready for tensors of one description.

    Args:
        plan: the variant.
        arch: of the GPU.
        tensors: of such a step; all that the caller of `run` has, and the two that it makes.
        queries: where queries stand, of QUERIES.
        attends: what reads the cache afterwards is told where these tensors are, in order; most of
            them are fields of AppendTensors. It reads rotated queries in place of q, if there are
            any, and the lengths then in place of seqlens_k.

    Raises:
        BackendUnavailableError, CompileError, FlashCoreError: see launch_append.
    """

    def __init__(
        self,
        plan: AppendPlan,
        arch: int,
        tensors: AppendTensors,
        queries: str,
        attends: Sequence[str],
    ) -> None:
        self._launch, self._content = _prepared_for(plan, arch, tensors, queries)
        self._spare: list[Argument] = []
        device, rotated = tensors.k_cache.device, tensors.q_rotated
        self._index = torch.cuda.current_device() if device.index is None else device.index
        dtype, num_bytes = tensors.k_new.dtype, 0
        if rotated is not None:
            num_bytes = -(-rotated.numel() * rotated.element_size() // _ALIGNMENT) * _ALIGNMENT
        self._lengths_offset = num_bytes
        num_bytes += tensors.lengths.numel() * tensors.lengths.element_size()
        self._new_memory = allocator(device, (-(-num_bytes // dtype.itemsize),), dtype)
        # One tensor may be two of them.
        same = {}
        if tensors.cu_seqlens_new is tensors.cu_seqlens_q:
            same["cu_seqlens_new"] = "cu_seqlens_q"
        if tensors.v_scale is tensors.k_scale:
            same["v_scale"] = "k_scale"
        given = [name for name in attends if name not in same]
        given += ["k_new", "v_new", *(() if rotated is None else ("cos", "sin"))]
        places = {name: place for place, name in enumerate(("", "q_rotated", "lengths", *given))}
        fields = [same.get(x, x) for x in AppendTensors._fields]
        self._told = operator.itemgetter(
            *(places[name] if getattr(tensors, name) is not None else 0 for name in fields)
        )
        written = {"seqlens_k": "lengths"} | ({} if rotated is None else {"q": "q_rotated"})
        self._read = operator.itemgetter(
            *(places[written.get(same.get(x, x), same.get(x, x))] for x in attends)
        )
        self._current_device, self._enqueue = torch._C._cuda_getDevice, self._launch.enqueue

    def run(self, addresses: Addresses) -> tuple[torch.Tensor, Addresses]:
        """Append, on the current stream.

        Args:
            addresses: of what attends, of k_new and v_new, and of cos and sin, if queries are
                rotated; that of a tensor that is two of these once.

        Returns:
            memory: has to be kept until the attention behind it is launched.
            addresses: of what attends.
        """
        if self._current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.run(addresses)
        memory = self._new_memory()
        rotated = memory.data_ptr()
        everything = (0, rotated, rotated + self._lengths_offset, *addresses)
        # The thread that takes an argument has it alone until the launch has copied it.
        try:
            argument = self._spare.pop()
        except IndexError:
            content = bytes(_POINTERS.size) + self._content
            argument = Argument(ctypes.create_string_buffer(content, len(content)))
        _POINTERS.pack_into(argument.memory, 0, *self._told(everything))
        self._enqueue(argument)
        self._spare.append(argument)
        return memory, self._read(everything)


def _prepared_for(plan: AppendPlan, arch: int, tensors: AppendTensors, queries: str) -> _Prepared:
    """Return what was prepared for such tensors; prepare it first where nothing was."""
    description = tuple([None if x is None else (x.shape, x.stride()) for x in tensors])
    index = tensors.k_cache.device.index
    key = plan, index, queries, description
    found = _prepared.get(key)
    if found is None:
        found = _prepare(plan, arch, index, tensors, queries)
        remember(_prepared, key, found)
    return found


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
