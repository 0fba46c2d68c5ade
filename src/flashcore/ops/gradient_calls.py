"""Look up the backward pass that was prepared for a description of tensors, as ops/calls.py does
the forward.

The entry of a forward call (calls.Found) remembers the backward pass that was prepared for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashcore.base import forks
from flashcore.base.gradient_workspace import workspace_bytes
from flashcore.launch.types import Prepared
from flashcore.ops.calls import FOUND_MAX, Passes
from flashcore.ops.guards import guard
from flashcore.ops.keys import remember

KEYS_MAX = 64  # of the passes of one description: alignments and circumstances
_lock = forks.lock()
_is_determinism_asked_for = torch._C._get_deterministic_algorithms  # looked up once


def circumstances() -> int:
    """Return what decides which kernels a pass has, besides tensors and options, as a key: what the
    process says of memory and of determinism. Less than 2^42."""
    return workspace_bytes() << 1 | _is_determinism_asked_for()


def find_pass(
    passes: Passes,
    of_rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    others: tuple[Tensor, ...],
    prepare: Callable[[], Prepared | None],
) -> tuple[Prepared, tuple[int, ...]] | None:
    """Return the kernels that were prepared for such tensors, to run on the current device.

    Args:
        passes: what was prepared for the same options and backend; more may be put into it.
        of_rows: q, k, v and out as the call has them, its lse, and the gradient of out.
        others: the mask, without a gradient, if there is one; then the lengths, in the order that
            `prepare` is given them.
        prepare: returns what computes the gradients of these tensors; see prepare_gradients.

    Returns:
        What computes dq, dk and dv, and what it takes: the tensors' addresses; None where the
        operator has to compute them.
    """
    q, k, v, out, lse, dout = of_rows
    try:
        at_q, at_k, at_v, at_out, at_dout = (
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), dout.data_ptr(),
        )  # fmt: skip
        addresses: tuple[int, ...] = at_q, at_k, at_v, at_out, lse.data_ptr(), at_dout
        key: object = (at_q | at_k | at_v | at_out | at_dout) & 15, circumstances()
        tensors: tuple[Tensor, ...] = of_rows
        if others:
            at_others = [x.data_ptr() for x in others]
            addresses += (*at_others,)
            # Lengths of queries and keys may be one tensor; a guard takes none twice.
            tensors += others[:1] if others[0] is others[-1] else others
            key = key, at_others[0] & 15, len(tensors)
        known = passes.get(key, ())
    except (AttributeError, TypeError, RuntimeError):
        return None  # a tensor without memory, say
    for fits, prepared in known:
        if fits(*tensors):
            return None if prepared is None else (prepared, addresses)
    if not all(addresses):
        return None
    prepared = prepare()
    remember(passes, _lock, key, (guard(*tensors), prepared), KEYS_MAX, FOUND_MAX)
    return None if prepared is None else (prepared, addresses)


def is_current(x: Tensor) -> bool:
    """Return whether a tensor is on the GPU that is the current one."""
    return x.is_cuda and torch._C._cuda_getDevice() == x.get_device()
