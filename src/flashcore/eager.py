"""The eager call of `attention`, which goes around torch's dispatcher.

A layer of the dispatcher costs as much as the launch of a kernel, so it is left to the calls that
need it: see `needs_dispatcher` and ops.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashcore import ops
from flashcore.calls import find_call
from flashcore.dispatch import Call
from flashcore.options import Options
from flashcore.problem import Causal, Window

Result = Tensor | tuple[Tensor, Tensor]

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def needs_dispatcher(q: object, k: object, v: object, mask: object) -> bool:
    """Whether somebody (a mode, a subclass, a transform, a tracer, forward-mode AD) must see the
    call as an operator."""
    c = torch._C
    if (
        c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or c._are_functorch_transforms_active()
        or c._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    if type(q) is type(k) is type(v) is Tensor and mask is None:
        return False
    return any(isinstance(x, Tensor) and type(x) not in _PLAIN_TYPES for x in (q, k, v, mask))


def attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
) -> Result:
    """`attention` of plain tensors."""
    try:
        recorded = torch.is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (mask is not None and mask.requires_grad)
        )
    except AttributeError:  # one of them is no tensor: find_call says which
        recorded = False
    call, options = find_call(
        q, k, v, mask, causal, window, softcap, scale, return_lse, backend, recorded
    )
    if recorded:
        result: Result = _record(call, options, return_lse, q, k, v, mask)
        return result
    out, lse = call(q, k, v, mask)
    return out if lse is None else (out, lse)


class _Recorded(torch.autograd.Function):
    """What the operator's autograd does, for half the time. The backward is the operator.

    Saves q, k, v, the mask, out and lse, so memory is linear in seqlen (besides the user's mask).
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        options: Options,
        return_lse: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> Result:
        out, lse = call(q, k, v, mask)
        assert lse is not None
        ctx.options = options
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        gradients = ops.backward(dout, dlse, *ctx.saved_tensors, *ctx.options, needs[3])
        pairs = zip(gradients, needs, strict=True)
        return None, None, None, *(g if need else None for g, need in pairs)


# torch.autograd.Function.apply first looks for functorch's transforms, which never come here.
_record = super(torch.autograd.Function, _Recorded).apply
