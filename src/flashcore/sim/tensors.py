"""Lay tensors out as a simulated kernel sees them.

They are copied: the kernel sees simulated addresses, 16 TiB apart, with the strides and the
alignment of the originals, so that no overrun of one tensor lands in another, and memory between a
strided tensor's elements holds NaN and counts as out of bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashcore.sim.abi import TensorStruct

_ADDRESS_BITS = 44  # as in runtime/global.cpp
# Alignment of torch's CPU allocations: below it, an address says how a view was cut out of them.
ADDRESS_ALIGNMENT = 64

_STORAGE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_POISON = {1: 0xA5, 2: 0x7FA5, 4: 0x7FA57FA5, 8: 0x7FA57FA57FA57FA5}  # NaN where it is a float


@dataclass(frozen=True, slots=True)
class SimTensor:
    """A SimTensor is a tensor that a simulated kernel may touch.

    Args:
        name: for reports.
        tensor: CPU tensor of any shape and strides.
        pointer_field: member of the parameter struct that gets its address, or several, or none;
            a dot leads into a member's own members.
        writable: whether the kernel writes it: it starts unwritten, and is copied back.
        complete: whether the kernel must write every element.
        counter: whether all threads change it by atomics; it is copied back.
        shared: of a writable one, whether other threads may read what one has written, where
            something orders the two.
        own: bool, of the tensor's shape: the elements that the kernel may touch, while all others
            stay as they are; None for all.
        sums: whether blocks add floats to it by bulk_add, one behind the other; it is copied back.
        any_order: of one with sums, whether adds need not follow one another; it holds numbers
            before, and nothing may be stored over them.
        late: whether the kernel before writes it, and may run beside this one: a thread touches it
            behind grid_dependency_wait(), or behind grid_starts_after_wait() and gmem_await().
    """

    name: str
    tensor: Tensor
    pointer_field: str | tuple[str, ...]
    writable: bool = False
    complete: bool = True
    counter: bool = False
    shared: bool = False
    sums: bool = False
    any_order: bool = False
    late: bool = False
    own: Tensor | None = None


class Placed:
    """Placed is a tensor's copy in a flat buffer with its strides, and what is known of each
    element."""

    def __init__(self, item: SimTensor, index: int) -> None:
        self.item = item
        tensor = item.tensor.detach()
        size = tensor.element_size()
        self.bits = _STORAGE[size]
        offsets = torch.zeros((), dtype=torch.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(length) * stride
        self.offsets = offsets.reshape(-1)
        span = int(self.offsets.max()) + 1 if self.offsets.numel() else 0
        self.data = torch.full((max(span, 1),), _POISON[size], dtype=self.bits)
        if not item.writable or item.own is not None:
            self.data[self.offsets] = tensor.contiguous().view(self.bits).reshape(-1)
        self.own = self.offsets if item.own is None else self.offsets[item.own.reshape(-1)]
        if item.writable:
            self.data[self.own] = _POISON[size]
        self.valid = torch.zeros(max(span, 1), dtype=torch.uint8)
        self.valid[self.own] = 1
        written = max(span, 1) if item.writable or item.sums else 0
        self.writer = torch.zeros(written, dtype=torch.int32)
        self.writer_site = torch.zeros(written, dtype=torch.int32)
        has_clock = item.shared or item.sums
        self.writer_clock = torch.zeros(written if has_clock else 0, dtype=torch.int32)
        middle = ((index + 1) << _ADDRESS_BITS) + (1 << (_ADDRESS_BITS - 1))
        self.address = middle + tensor.data_ptr() % ADDRESS_ALIGNMENT
        self.struct = TensorStruct(
            name=item.name.encode(),
            address=self.address,
            data=self.data.data_ptr(),
            bytes=span * size,
            element_bytes=size,
            writable=self._kind(),
            is_late=item.late,
            valid=self.valid.data_ptr(),
            writer=self.writer.data_ptr() if written else None,
            writer_site=self.writer_site.data_ptr() if written else None,
            writer_clock=self.writer_clock.data_ptr() if has_clock else None,
        )

    def _kind(self) -> int:
        """Return FcTensor::writable."""
        item = self.item
        kinds = (2, item.counter), (3, item.shared), (5, item.any_order), (4, item.sums)
        for kind, applies in kinds:
            if applies:
                return kind
        return int(self.item.writable)

    def coordinates(self, offset: int) -> tuple[int, ...] | None:
        """Return index of the element at an offset; past a dimension's end, where it would be."""
        if offset < 0:
            return None
        shape, strides = self.item.tensor.shape, self.item.tensor.stride()
        index = [0] * len(shape)
        for d in sorted(range(len(shape)), key=lambda d: -strides[d]):
            if shape[d] > 1 and strides[d] > 0:
                index[d], offset = divmod(offset, strides[d])
        return tuple(index)

    def first_unwritten(self) -> int | None:
        missing = self.own[self.writer[self.own] == 0]
        return int(missing.min()) if missing.numel() else None

    def copy_back(self) -> None:
        flat = self.data[self.offsets].view(self.item.tensor.dtype)
        self.item.tensor.detach().copy_(flat.reshape(self.item.tensor.shape))
