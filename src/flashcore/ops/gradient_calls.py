"""Look up the backward pass that was prepared for a description of tensors, as ops/calls.py does
the forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashcore.backends.backward_sm90 import Prepared
from flashcore.backends.dispatch import without_autocast
from flashcore.backends.gradients import prepare_gradients
from flashcore.base import determinism, forks
from flashcore.ops.calls import CALLS_MAX, FOUND_MAX
from flashcore.ops.guards import guard
from flashcore.ops.keys import mask_key, remember
from flashcore.problem.options import Options

# The test of whether a call fits, and its backward pass; None where the operator computes it.
_Known = tuple[Callable[..., bool], Prepared | None]
_calls: dict[object, tuple[_Known, ...]] = {}
_lock = forks.lock()


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute dq, dk and dv by kernels that were prepared for such tensors, on the current device.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: as in `attention`, without a gradient; or None.
        out: the forward's output.
        lse: the forward's lse.
        dout: gradient of out.
        options: of the forward.
        backend: as in `attention`.

    Returns:
        (dq, dk, dv); None where the operator has to compute them.
    """
    tensors = q, k, v, out, lse, dout
    try:
        at = q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr() | dout.data_ptr()
        of_mask = None if mask is None else mask_key(mask)
        key = q.shape, k.shape, at & 15, options, backend, of_mask, determinism.may_differ()
        known = _calls.get(key, ())
    except (AttributeError, TypeError, RuntimeError):
        return None
    at_mask = 0 if mask is None else mask.data_ptr()
    for fits, prepared in known:
        if fits(*tensors):
            return None if prepared is None else prepared(*tensors, at_mask)
    problem = options.problem(q, k, v, mask, return_lse=True)
    with without_autocast(problem.device):
        prepared = prepare_gradients(problem, q, k, v, mask, out, lse, dout, backend)
    remember(_calls, _lock, key, (guard(*tensors), prepared), CALLS_MAX, FOUND_MAX)
    return None if prepared is None else prepared(*tensors, at_mask)


def is_current(x: Tensor) -> bool:
    """Return whether a tensor is on the GPU that is the current one."""
    return x.is_cuda and torch._C._cuda_getDevice() == x.get_device()
