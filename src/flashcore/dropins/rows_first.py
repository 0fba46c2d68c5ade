"""Compute `attention` of [batch, seqlen, num_heads, head_dim] tensors, as flash-attn has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flashcore.launch.types import Addresses, Call
from flashcore.ops.calls import Found, attend, find, keep
from flashcore.ops.eager import needs_dispatcher, record
from flashcore.ops.guards import guard
from flashcore.problem import Causal, Window

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # looked up once, not in every call
_UNBOUNDED = (-1, -1)


def rows_first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Compute a call by a kernel that takes its tensors as they are, if nobody else needs to see
    it, autograd included.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim].
        k: [batch, seqlen_k, num_heads_kv, head_dim].
        v: [batch, seqlen_k, num_heads_kv, head_dim_v].
        causal: False, or True for the lower right.
        window: (left, right); both -1 for none.
        softcap: 0.0 for none.
        scale: None for 1 / sqrt(head_dim).
        return_lse: whether the log-sum-exp is returned too.

    Returns:
        out, [batch, seqlen_q, num_heads_q, head_dim_v], contiguous, or (out, lse); None where
        `attention` has to look at the call.
    """
    if (
        is_dynamo_compiling()
        or (causal is not False and causal is not True)
        or type(window) is not tuple
        or (window != _UNBOUNDED and not _is_band(window))
        or type(softcap) is not float
        or _is_any_autocast_enabled()
        or needs_dispatcher(q, k, v, None)
    ):
        return None
    cap = None if softcap == 0.0 else softcap
    sides = None if window == _UNBOUNDED else window
    return attend(  # type: ignore[return-value]
        q, k, v, None, causal, sides, cap, scale, return_lse, "auto", record, _decide
    )


def _is_band(window: tuple[Any, ...]) -> bool:
    """Return whether `attention` takes a window for what flash-attn does: there any negative number
    is -1."""
    return len(window) == 2 and all(type(size) is int and size >= -1 for size in window)


def _decide(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: None,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
    recorded: bool,
    key: object,
) -> Found | None:
    """Return what computes the call; None where no kernel does, or autograd records."""
    if key is None or recorded or q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return None
    heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    found = find(*heads_first, mask, causal, window, softcap, scale, return_lse, backend)
    kernel = getattr(found.call, "__self__", None)
    if kernel is None:  # it is no KernelCall's
        return None
    direct = kernel.with_rows_first()
    call = _transposed(found.call) if direct is None else direct.run
    found = Found(guard(q, k, v), call, found.options, {}, backend)
    keep(key, found)
    return found


def _transposed(call: Call) -> Call:
    """Return a call of a kernel, for which addresses are enough, whose out has rows first."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, addresses: Addresses
    ) -> tuple[Tensor, Tensor | None]:
        out, lse = call(q, k, v, mask, addresses)
        return out.transpose(1, 2).contiguous(), lse

    return run
