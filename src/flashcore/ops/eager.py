"""Tell what an eager call of `attention` needs to go around torch's dispatcher.

A layer of the dispatcher costs as much as the launch of a kernel, so it is left to the calls that
need it: see `needs_dispatcher` and ops/dense.py. The way itself is calls.attend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from flashcore.ops.calls import Result, State, attend_lengths
from flashcore.ops.dense import OPERATORS, attention_dense
from flashcore.ops.family import BackwardCall
from flashcore.ops.gradient_calls import gradients, is_current
from flashcore.ops.transforms.autograd import needs_grad
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.options import Inputs, Options, Results

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

# Looked up once, not in every call.
_is_grad_enabled = torch.is_grad_enabled
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_torch_function_stack = torch._C._len_torch_function_stack
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_get_tracing_state = torch._C._get_tracing_state


def needs_dispatcher(q: object, k: object, v: object, mask: object) -> bool:
    """Return whether somebody (a mode, a subclass, a transform, a tracer, forward-mode AD) must see
    the call as an operator."""
    if (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    if type(q) is type(k) is type(v) is Tensor and (mask is None or type(mask) is Tensor):
        return False
    return any(isinstance(x, Tensor) and type(x) not in _PLAIN_TYPES for x in (q, k, v, mask))


def is_plain(lengths: tuple[object, ...], q: Any, k: Any, v: Any, mask: Any, sinks: Any) -> bool:
    """Return whether a call with lengths or sinks needs neither the dispatcher nor autograd.

    Args:
        lengths: of its sequences.
        q: as in `attention`, like all that follow.
        k: see q.
        v: see q.
        mask: or None.
        sinks: or None.
    """
    if is_compiling() or needs_dispatcher(q, k, v, mask):
        return False
    for x in lengths:
        if type(x) is not Tensor:
            return False
    if sinks is not None and type(sinks) not in _PLAIN_TYPES:
        return False
    if not _is_grad_enabled():
        return True
    if type(q) is type(k) is type(v) is Tensor and mask is None and sinks is None:
        return not (q.requires_grad or k.requires_grad or v.requires_grad)  # what most calls need
    return not needs_grad(q, k, v, mask, sinks)


def attention_with_sinks(
    inputs: Inputs,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    return_max_score: bool,
    backend: str,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute `attention` where sinks are given, and seqlens_k is not; see there."""
    q, k, v, mask, *_ = inputs
    sinks = inputs.sinks
    if is_plain((), q, k, v, mask, sinks):

        def describe() -> Problem:
            options = Options.checked(causal, window, softcap, scale, batch_invariant)
            return options.problem(q, k, v, mask, return_lse, sinks)

        asked = causal, window, softcap, scale, return_lse, return_max_score
        result = attend_lengths(
            q, k, v, mask, (), sinks, asked, None, backend, describe, batch_invariant
        )
        if result is not None:
            return result
    return attention_dense(
        inputs, causal, window, softcap, scale, return_lse, return_max_score, backend,
        batch_invariant,
    )  # fmt: skip


class _Recorded(torch.autograd.Function):
    """Do what the operator's autograd does, for half the time. The backward is the operator.

    Saves q, k, v, the mask, out and lse, so memory is linear in seqlen (besides the user's mask).
    """

    @staticmethod
    def forward(ctx: Any, state: State, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Result:
        (_, call, ctx.options, ctx.backend), return_lse, addresses = state
        out, lse, *max_score = call(q, k, v, mask[0] if mask else None, addresses)
        assert lse is not None
        ctx.save_for_backward(q, k, v, out, lse, *mask)
        if not (return_lse or max_score):
            return out
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*max_score)
        return (out, lse, *max_score) if return_lse else (out, *max_score)

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dlse = others[0] if others else None  # in its place max_score has none
        q, k, v, out, lse, *masks = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        mask, needs_mask = (masks[0], needs[3]) if masks else (None, False)
        if (
            dout is not None
            and dlse is None
            and not needs_mask
            and not torch.is_grad_enabled()
            and is_current(q)
            and not needs_dispatcher(q, k, dout, mask)
        ):
            found = gradients(q, k, v, mask, out, lse, dout, ctx.options, ctx.backend)
            if found is not None:
                pairs = zip((*found, None), needs, strict=False)
                return None, *(g if need else None for g, need in pairs)
        arriving, inputs, results = Results(dout, dlse), Inputs(q, k, v, mask), Results(out, lse)
        computed = OPERATORS.gradients(
            BackwardCall(arriving, inputs, results, ctx.options, (needs_mask, False), ctx.backend)
        )
        return None, *(g if need else None for g, need in zip(computed, needs, strict=False))


# torch.autograd.Function.apply first looks for functorch's transforms, which never come here.
record = super(torch.autograd.Function, _Recorded).apply
