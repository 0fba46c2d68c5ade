"""Say how a tensor lies in memory, and lay its values out the same way again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashcore.sim.tensors import ADDRESS_ALIGNMENT


def storage_offset(tensor: Tensor) -> int:
    """Return elements between an allocation's alignment and the tensor's first element."""
    return tensor.data_ptr() % ADDRESS_ALIGNMENT // tensor.element_size()


def distinct(tensor: Tensor) -> Tensor:
    """Return the tensor in four dimensions, each value once: broadcast dimensions cut to one
    element."""
    tensor = tensor.detach()[(None,) * (4 - tensor.dim())]
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def place(values: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
    """Return values, broadcast to a shape with the given strides, `offset` elements into an
    allocation."""
    span = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    placed = torch.zeros(offset + max(span, 1), dtype=values.dtype)
    placed = placed.as_strided(tuple(shape), tuple(strides), offset)
    values_once = distinct(placed)
    values_once.copy_(values.expand(tuple(shape))[tuple(slice(n) for n in values_once.shape)])
    return placed
