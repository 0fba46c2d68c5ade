"""Allocate memory for a kernel's results, without the layers that torch.empty goes through."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from flashcore.problem import Problem


def unseen_scores(problem: Problem, q: torch.Tensor) -> torch.Tensor:
    """Return the largest score of each head of [batch, num_heads_q] before any key is seen: -inf.
    Kernels raise it."""
    shape = (problem.batch, problem.num_heads_q)
    return q.new_full(shape, -math.inf, dtype=problem.lse_dtype)


def allocator(
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    strides: tuple[int, ...] | None = None,
) -> Callable[[], torch.Tensor]:
    """Return what makes contiguous tensors of a shape and dtype on a device, not initialised.

    No mode and no transform sees them made. A GPU must be the current one then.
    """
    if strides is None:
        contiguous = [1]
        for size in reversed(shape[1:]):
            contiguous.insert(0, contiguous[0] * size)
        strides = tuple(contiguous)
    # The code that torch.compile generates allocates by this: half the time of torch.empty_like.
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if fast is not None:
        return functools.partial(fast, shape, strides, dtype)
    return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
