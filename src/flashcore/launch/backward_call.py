"""Prepare launches of the backward kernels, as launch/kernel_call.py does those of the forward."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from flashcore.base.bounded import make_room
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
from flashcore.launch.allocation import allocator
from flashcore.launch.counters import COUNTER_BYTES, clear_counters, work_counters
from flashcore.launch.driver_launch import Argument
from flashcore.launch.types import KernelEntry, PassEntry
from flashcore.problem import Problem

# Kept of each description. A training step meets one set of addresses a layer and micro-batch.
ARGUMENTS_MAX = 1024
COUNTERS = 4  # of a pass: where dq, and dk and dv, draw tiles; and how much of delta is there
_KINDS = {torch.float32: 1, torch.int32: 2}  # see PassEntry.made
_POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)
_lock = threading.Lock()
_Kept = TypeVar("_Kept")


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
        tensors: by name as build_params_bwd_sm90 takes them, of that description; `launch` takes
            addresses in their order.
        device_index: where they are.
        beside: whether it is of two kernels that run side by side, that of dk and dv waiting for
            delta by a count; then `argument` has to be told of the counters that they share.
    """

    def __init__(
        self,
        problem: Problem,
        plan: BwdSm90Plan,
        tensors: Mapping[str, Tensor],
        device_index: int,
        beside: bool = False,
    ) -> None:
        grid = kernel_call._grid_size(problem, plan, device_index)
        self._launch = kernel_call._launch(plan, grid, device_index)
        self._grid, self._plan, self.device_index = grid, plan, device_index
        addresses = {name: x.data_ptr() for name, x in tensors.items()}
        params = build_params_bwd_sm90(problem, plan, tensors, grid, addresses)
        places = {name: place for place, name in enumerate(tensors)}
        offsets = _pointer_offsets(plan.gate is not None)
        # Where the argument has addresses of counters, and which number of a launch's they are.
        self._counters = []
        if plan.draws_tiles:
            self._counters.append((offsets["tile_counter"], 0 if plan.is_dq else 1))
        if beside:
            self._counters.append((offsets["delta_count"], 2))
        # Where the argument has an address, as a number of pointers, and which of `addresses`.
        self._pointers = [
            (offset // _POINTER_BYTES, places[name])
            for name, offset in offsets.items()
            if name in places
        ]
        # Offset of a descriptor, which of `addresses`, bytes of the tensor before the map.
        self._maps: list[tuple[int, int, int]] = []
        for name in plan.box_rows:
            field = f"{name}_map"
            tensor_map = getattr(params, field)
            shift = (tensors[name].data_ptr() - tensor_map.base) % 2**64
            offset = getattr(type(params), field).offset
            self._maps.append((offset, places[name], shift))
            setattr(params, field, descriptors.encode_kind(tensor_map, problem.dtype))
        self._content = bytes(params)
        self._words = ctypes.c_uint64 * (len(self._content) // _POINTER_BYTES)
        self._known: dict[tuple[int, ...], Argument] = {}
        self.enqueue = self._launch.enqueue  # where the device is the current one

    @property
    def has_counters(self) -> bool:
        """Return whether its blocks count anything."""
        return bool(self._counters)

    def argument(self, addresses: Sequence[int], counters: int) -> Argument:
        """Return the argument of tensors of the description, with COUNTERS counters, which the
        kernels of a pass share."""
        argument = Argument(*descriptors.aligned(self._content))
        words = self._words.from_address(argument.address)
        for at, place in self._pointers:
            words[at] = addresses[place]
        for offset, number in self._counters:
            words[offset // _POINTER_BYTES] = counters + number * COUNTER_BYTES
        pairs = ((at, (addresses[place] - shift) % 2**64) for at, place, shift in self._maps)
        descriptors.readdress(argument.address, pairs)
        return argument

    def entry(self) -> KernelEntry:
        """Return the entry for the compiled launcher."""
        plan = self._plan
        return KernelEntry(
            kernel=self._launch.handle,
            grid=self._grid,
            num_threads=plan.num_threads,
            smem_bytes=plan.smem_bytes,
            starts_early=plan.starts_early,
            argument=self._content,
            pointers=tuple((at * _POINTER_BYTES, place) for at, place in self._pointers),
            maps=tuple(self._maps),
            counters=tuple((at, number * COUNTER_BYTES) for at, number in self._counters),
        )

    def launch(self, addresses: tuple[int, ...]) -> None:
        """Launch on the device's current stream.

        Args:
            addresses: of tensors of the description that this was made for, in its order.
        """
        counters = _counters([self])
        key = (*addresses, counters)
        argument = self._known.get(key)
        if argument is None:
            argument = self.argument(addresses, counters)
            _keep(self._known, key, argument)
        self._launch(argument)


class BackwardPass:
    """A BackwardPass is the kernels of a backward pass, one launched behind the other, ready for
    tensors of one description: one look-up finds the arguments of all. See types.Prepared.

    Args:
        kernels: of one description, in the order that they run in. Their device must be the current
            one in every launch.
        made: tensors like those that a pass makes, dq, dk and dv among them, by name. They are the
            last that the kernels take.
    """

    def __init__(self, kernels: Sequence[BackwardKernel], made: Mapping[str, Tensor]) -> None:
        self._kernels = tuple(kernels)
        self._known: dict[tuple[int, ...], tuple[Argument, ...]] = {}
        self._enqueues = tuple(kernel.enqueue for kernel in kernels)
        self._made = tuple(
            (tuple(x.shape), x.stride(), _KINDS.get(x.dtype, 0)) for x in made.values()
        )
        self._makers = tuple(
            allocator(x.device, tuple(x.shape), x.dtype, x.stride()) for x in made.values()
        )
        self._gradients = tuple(list(made).index(name) for name in ("dq", "dk", "dv"))

    def __call__(self, addresses: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Launch all on the device's current stream; return dq, dk and dv."""
        made = [make() for make in self._makers]
        counters = _counters(self._kernels)
        key = (*addresses, *[x.data_ptr() for x in made], counters)
        arguments = self._known.get(key) or self._make(key)
        try:
            for enqueue, argument in zip(self._enqueues, arguments, strict=True):
                enqueue(argument)
        except BaseException:  # the kernels that are missing would have set counters back to 0
            if counters:
                clear_counters(_device_of(self._kernels), counters, COUNTERS)
            raise
        dq, dk, dv = self._gradients
        return made[dq], made[dk], made[dv]

    def entry(self) -> PassEntry:
        """Return the entry for the compiled launcher."""
        entries = tuple(kernel.entry() for kernel in self._kernels)
        num_counters = COUNTERS if any(kernel.has_counters for kernel in self._kernels) else 0
        index = self._kernels[0].device_index
        return PassEntry(index, entries, self._made, self._gradients, num_counters)

    def _make(self, key: tuple[int, ...]) -> tuple[Argument, ...]:
        """Return the arguments of these tensors and counters, and keep them."""
        *addresses, counters = key
        arguments = tuple(kernel.argument(addresses, counters) for kernel in self._kernels)
        _keep(self._known, key, arguments)
        return arguments


def _device_of(kernels: Sequence[BackwardKernel]) -> torch.device:
    return torch.device("cuda", kernels[0].device_index)


def _counters(kernels: Sequence[BackwardKernel]) -> int:
    """Return the address of counters for launches of such kernels on the current stream, 0 if they
    have none."""
    if not any(kernel.has_counters for kernel in kernels):
        return 0
    return work_counters(_device_of(kernels), COUNTERS)


def _keep(known: dict[tuple[int, ...], _Kept], key: tuple[int, ...], entry: _Kept) -> None:
    with _lock:
        make_room(known, ARGUMENTS_MAX)
        known[key] = entry


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
    problem: Problem, plan: BwdSm90Plan, described: _Described, device_index: int, beside: bool
) -> BackwardKernel:
    tensors, described.tensors = described.tensors, None  # the cache keeps the key
    assert tensors is not None
    return BackwardKernel(problem, plan, tensors, device_index, beside)


def kernel_of(
    problem: Problem, plan: BwdSm90Plan, tensors: Mapping[str, Tensor], beside: bool = False
) -> BackwardKernel:
    """Return the kernel of a plan, prepared once for all tensors of the same description.

    Args:
        problem: of the forward.
        plan: of one of the kernels.
        tensors: by name, as build_params_bwd_sm90 takes them, of the current device.
        beside: see BackwardKernel.
    """
    index = tensors["q"].device.index or 0
    return _kernel(problem, plan, _Described(tensors), index, beside)
