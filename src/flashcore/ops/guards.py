"""Find what tells tensors of one description from others, in one call into C++ where torch has
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def guard(*tensors: Tensor, any_keys: bool = False) -> Callable[..., bool]:
    """Return what tells whether other things are tensors of the same types, shapes, strides, dtypes
    and devices as these, and negated views, or in need of a gradient, or not, as they are.

    Args:
        *tensors: q, k and v.
        any_keys: k and v may have another length, and other strides but between elements.
    """
    guards: Any = torch._C._dynamo.guards
    sizes, strides = _sizes_and_strides(tensors, any_keys)
    try:
        # torch.compile guards the code that it generates by this: one call, in C++. It also wants
        # the same requires_grad, the same dispatch keys, and no tensor twice.
        check: Callable[..., bool] = guards.TensorGuards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
        if check(*tensors):
            return check
    except (AttributeError, TypeError, RuntimeError):
        pass  # another torch has others
    expected = _description(tensors, any_keys)
    return lambda *others: _description(others, any_keys) == expected


def _sizes_and_strides(
    tensors: tuple[Tensor, ...], any_keys: bool
) -> tuple[list[list[int | None]], list[list[int | None]]]:
    """Return sizes and strides of each tensor; None where any will do."""
    sizes: list[list[int | None]] = [list(x.shape) for x in tensors]
    strides: list[list[int | None]] = [list(x.stride()) for x in tensors]
    for i in (1, 2) if any_keys else ():
        sizes[i][2:3], strides[i][:3] = [None], [None] * 3
    return sizes, strides


def _description(tensors: tuple[Any, ...], any_keys: bool) -> object:
    if not all(isinstance(x, Tensor) for x in tensors):
        return None
    kinds = [(type(x), x.dtype, x.device, x.is_neg(), x.requires_grad) for x in tensors]
    return kinds, _sizes_and_strides(tensors, any_keys)
