"""Prepare launches of the backward kernels, as launch/kernel_call.py does those of the forward."""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from flashcore.kernels.bwd_sm90.params import (
    LENGTHS,
    POINTERS,
    AttnBwdSm90GateParams,
    AttnBwdSm90Params,
    build_params_bwd_sm90,
)
from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
from flashcore.kernels.fwd_wmma.params import AttnGateParams, AttnParams
from flashcore.launch import descriptors, kernel_call
from flashcore.launch.counters import own_counter, work_counters
from flashcore.launch.driver_launch import Argument
from flashcore.problem import Problem

ARGUMENTS_MAX = 256  # kept by each kernel of a description
_POINTER = struct.Struct("Q")
_lock = threading.Lock()


@functools.cache
def _pointer_offsets(has_gate: bool) -> dict[str, int]:
    """Return where the kernels' argument has addresses, by name of the tensor."""
    names = ["q", "k", "v", "mask", "out", "lse", "tile_counter", *LENGTHS]
    struct: type[AttnBwdSm90Params | AttnBwdSm90GateParams] = AttnBwdSm90Params
    of_attn = AttnParams
    if has_gate:
        struct, of_attn = AttnBwdSm90GateParams, AttnGateParams
        names.append("gate_scores")
    offsets = {name: struct.attn.offset + getattr(of_attn, name).offset for name in names}
    return offsets | {name: getattr(struct, name).offset for name in POINTERS}


class BackwardKernel:
    """A BackwardKernel is a plan on a device, ready for tensors of one description.

    Args:
        problem: of the forward.
        plan: of one of the kernels.
        tensors: by name as build_params_bwd_sm90 takes them, of that description.
        device_index: where they are.
    """

    def __init__(
        self, problem: Problem, plan: BwdSm90Plan, tensors: Mapping[str, Tensor], device_index: int
    ) -> None:
        grid = kernel_call._grid_size(problem, plan, device_index)
        self._launch = kernel_call._launch(plan, grid, device_index)
        self._counts_on = torch.device("cuda", device_index) if plan.draws_tiles else None
        addresses = {name: x.data_ptr() for name, x in tensors.items()}
        params = build_params_bwd_sm90(problem, plan, tensors, grid, addresses)
        self._offsets = _pointer_offsets(plan.gate is not None)
        self._maps: list[tuple[str, int, int]] = []  # tensor, offset, bytes of it before the map
        for name in plan.box_rows:
            field = f"{name}_map"
            tensor_map = getattr(params, field)
            shift = (tensors[name].data_ptr() - tensor_map.base) % 2**64
            offset = getattr(type(params), field).offset
            self._maps.append((name, offset, shift))
            setattr(params, field, descriptors.encode_kind(tensor_map, problem.dtype))
        self._content = bytes(params)
        self._arguments: dict[tuple[int, ...], Argument] = {}

    def launch(self, names: tuple[str, ...], addresses: tuple[int, ...]) -> None:
        """Launch on the device's current stream.

        Args:
            names: of the tensors, the same in every call.
            addresses: of tensors of the description that this was made for.
        """
        self._launch(self._arguments.get(addresses) or self._make(names, addresses))

    def _make(self, names: tuple[str, ...], addresses: tuple[int, ...]) -> Argument:
        """Return the argument of these tensors, kept unless its counter is a capture's."""
        argument = Argument(*descriptors.aligned(self._content))
        by_name = dict(zip(names, addresses, strict=True))
        is_kept = True
        if self._counts_on is not None:
            is_kept = not torch.cuda.is_current_stream_capturing()
            counter = (own_counter if is_kept else work_counters)(self._counts_on)
            by_name["tile_counter"] = counter
        for name, offset in self._offsets.items():
            if name in by_name:
                _POINTER.pack_into(argument.memory, argument.offset + offset, by_name[name])
        pairs = ((at, (by_name[name] - shift) % 2**64) for name, at, shift in self._maps)
        descriptors.readdress(argument.address, pairs)
        if is_kept:
            with _lock:
                while len(self._arguments) >= ARGUMENTS_MAX:
                    del self._arguments[next(iter(self._arguments))]  # the oldest
                self._arguments[addresses] = argument
        return argument


class _Described:
    """A _Described is tensors as a key of what depends on their strides alone, not on addresses."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors: Mapping[str, Tensor] | None = tensors
        self._key = tuple((name, x.shape, x.stride()) for name, x in tensors.items())
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and self._key == other._key


@functools.lru_cache(maxsize=4096)
def _kernel(
    problem: Problem, plan: BwdSm90Plan, described: _Described, device_index: int
) -> BackwardKernel:
    tensors, described.tensors = described.tensors, None  # the cache keeps the key
    assert tensors is not None
    return BackwardKernel(problem, plan, tensors, device_index)


def kernel_of(problem: Problem, plan: BwdSm90Plan, tensors: Mapping[str, Tensor]) -> BackwardKernel:
    """Return the kernel of a plan, prepared once for all tensors of the same description.

    Args:
        problem: of the forward.
        plan: of one of the kernels.
        tensors: by name, as build_params_bwd_sm90 takes them, of the current device.
    """
    index = tensors["q"].device.index
    return _kernel(
        problem, plan, _Described(tensors), 0 if index is None else index
    )  # fmt: skip
