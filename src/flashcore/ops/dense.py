"""Define attention as operators of torch: `flashcore::attention_forward`,
`flashcore::attention_backward`.

An eager call on plain tensors does without them (ops/eager.py). They serve whoever must see a call
as one node of a graph or take it apart: torch.compile, torch.export, torch.func, modes, subclasses.
Their arguments are plain values; what depends on sizes, which may be symbolic, is checked when they
run, and only kinds (rank, dtype, device) when they are traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.backends.autocasting import autocast_dtype
from flashcore.backends.dispatch import check_backend, without_autocast
from flashcore.backends.gradients import attention_gradients
from flashcore.ops import flops
from flashcore.ops.autograd import (
    below_autograd,
    needs_grad,
    register_autograd,
    warn_of_forward_mode,
)
from flashcore.ops.batching import backward_vmap, forward_vmap
from flashcore.ops.calls import attend
from flashcore.ops.plain import backward_plain, forward_plain
from flashcore.ops.second_order import backward_of_backward
from flashcore.problem import Causal, Window
from flashcore.problem.options import Options
from flashcore.problem.validation import check_kinds, check_mask, check_mask_kind, check_qkv

Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]

_OPTIONS = "str causal, SymInt window_left, SymInt window_right, Scalar softcap, Scalar? scale"
_LIBRARY = torch.library.Library("flashcore", "DEF")
# A compiler may choose other strides for what lies between operators; head_dim must stay
# contiguous, an expanded mask should stay expanded, and strides decide which kernel serves.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, "
    f"{_OPTIONS}, bool return_lse, str backend) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? mask, "
    f'Tensor out, Tensor lse, {_OPTIONS}, bool needs_mask_grad, str backend="auto") '
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
forward = torch.ops.flashcore.attention_forward.default
backward = torch.ops.flashcore.attention_backward.default


def attention_dispatched(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` through the operator. torch.compile traces this function."""
    options = Options.checked(causal, window, softcap, scale)
    check_backend(backend)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False, but is {return_lse!r}")
    # Where autograd records at a level that this one does not see, the gradient would have to
    # compute lse itself.
    wants_lse = return_lse or needs_grad(q, k, v, mask)
    if not torch.compiler.is_dynamo_compiling():
        check_kinds(q, k, v)
        wants_lse = wants_lse or torch._C._are_functorch_transforms_active()
    out, lse = forward(q, k, v, mask, *options, wants_lse, backend)
    return (out, lse) if return_lse else out


def autocast(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors as torch.autocast wants them for SDPA: in its dtype, float64 as it is. A
    float32 mask is read as it is."""
    device = q.device.type if isinstance(q, Tensor) else "cpu"
    dtype = autocast_dtype(device)
    if dtype is None:
        return q, k, v, mask

    def cast(x: Tensor, keep: torch.dtype = torch.float64) -> Tensor:
        if not isinstance(x, Tensor) or x.device.type != device or not x.is_floating_point():
            return x
        return x if x.dtype in (torch.float64, keep) else x.to(dtype)

    return cast(q), cast(k), cast(v), None if mask is None else cast(mask, torch.float32)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float | None,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute (out, lse); lse has no elements unless asked for."""
    result = attend(
        q,
        k,
        v,
        mask,
        False if causal == "none" else causal,
        (window_left, window_right),
        softcap or None,
        scale,
        return_lse,
        backend,
    )
    if isinstance(result, tuple):
        return result
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return result, q.new_empty(0, dtype=dtype)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float | None,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_kinds(q, k, v)
    if mask is not None:
        check_mask_kind(mask, q)
    check_backend(backend)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(q.shape[:3] if return_lse else (0,), dtype=lse_dtype)


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float | None,
    needs_mask_grad: bool,
    backend: str = "auto",
) -> Tensors4:
    """Compute dq, dk, dv and dmask; dmask has no elements unless asked for."""
    check_backend(backend)
    options = Options(causal, window_left, window_right, softcap, scale)
    problem = options.problem(q, k, v, mask, return_lse=True)
    with without_autocast(problem.device):
        dq, dk, dv, dmask = attention_gradients(
            problem, q, k, v, mask, out, lse, dout, dlse, needs_mask_grad, backend
        )
    return dq, dk, dv, q.new_empty(0) if dmask is None else dmask


def _backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float | None,
    needs_mask_grad: bool,
    backend: str = "auto",
) -> Tensors4:
    check_backend(backend)
    dmask = torch.empty_like(mask) if needs_mask_grad and mask is not None else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dmask


class _Forward(torch.autograd.Function):
    """Record the forward operator.

    Saves q, k, v, the mask, out and lse, so memory is linear in seqlen (besides the user's mask).
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Call the operator of `_forward`."""
        q, k, v, mask, *options, return_lse, backend = inputs
        out, lse = below_autograd(forward, keyset, inputs)
        ctx.options, ctx.has_lse, ctx.backend = Options(*options), return_lse, backend
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.set_materialize_grads(False)
        if not return_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradient through the backward operator, which is recorded too."""
        q, k, v, mask, out, lse = ctx.saved_tensors
        if not ctx.has_lse:  # it was not asked for: compute it now
            out, lse = forward(q, k, v, mask, *ctx.options, True, ctx.backend)
        needs = ctx.needs_input_grad[1:5]
        options = *ctx.options, needs[3], ctx.backend
        gradients = backward(dout, dlse, q, k, v, mask, out, lse, *options)
        pairs = zip(gradients, needs, strict=True)
        return None, *(g if need else None for g, need in pairs), *(None,) * 7


class _Backward(torch.autograd.Function):
    """Record the backward operator. out and lse get no gradient: they are functions of the others,
    and counted there."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> Tensors4:
        """Call the operator of `_backward`."""
        gradients: Tensors4 = below_autograd(backward, keyset, inputs)
        ctx.options, ctx.num_inputs = Options(*inputs[8:13]), len(inputs)
        ctx.save_for_backward(*inputs[:6])
        ctx.set_materialize_grads(False)
        if not inputs[13]:
            ctx.mark_non_differentiable(gradients[3])
        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradient by operations of torch, which are recorded too."""
        dout, dlse, q, k, v, mask = ctx.saved_tensors
        with without_autocast(q.device.type):
            gradients = backward_of_backward(dout, dlse, q, k, v, mask, cotangents, ctx.options)
        needs = ctx.needs_input_grad[1:7]
        pairs = zip(gradients, needs, strict=True)
        rest = (None,) * (ctx.num_inputs - len(gradients))
        return None, *(g if need else None for g, need in pairs), *rest


def _forward_plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Compute `_forward` by operations of torch, for forward mode."""
    *given, return_lse, backend = arguments
    check_qkv(q, k, v)
    if mask is not None:
        check_mask(mask, q, k.shape[2])
    options = Options(*given).with_checked_factors()
    warn_of_forward_mode(q, backend)
    with without_autocast(q.device.type):
        out, lse = forward_plain(q, k, v, mask, options)
    return out, lse if return_lse else lse.new_empty(0)


def _backward_plain(*inputs: Any) -> Tensors4:
    """Compute `_backward` by operations of torch, for forward mode."""
    dout, dlse, q, k, v, mask = inputs[:6]
    with without_autocast(q.device.type):
        dq, dk, dv, dmask = backward_plain(dout, dlse, q, k, v, mask, Options(*inputs[8:13]))
    return dq, dk, dv, dmask if inputs[13] and dmask is not None else q.new_empty(0)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("attention_forward", _forward, _device)
    _LIBRARY.impl("attention_backward", _backward, _device)
torch.library.register_fake(forward, _forward_fake, lib=_LIBRARY)
torch.library.register_fake(backward, _backward_fake, lib=_LIBRARY)
register_autograd(_LIBRARY, forward, _Forward, _forward_plain)
register_autograd(_LIBRARY, backward, _Backward, _backward_plain)
torch.library.register_vmap(forward, forward_vmap, lib=_LIBRARY)
torch.library.register_vmap(backward, backward_vmap, lib=_LIBRARY)
flops.register("attention_forward", "attention_backward")
