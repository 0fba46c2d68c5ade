"""`attention_varlen`: sequences of different lengths, packed one after the other; as operators of
torch, `flashcore::attention_varlen_forward` and `flashcore::attention_varlen_backward`."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from flashcore.calls import attend_lengths
from flashcore.dispatch import BACKENDS, choose_backend, warn_once
from flashcore.eager import is_plain
from flashcore.ops import autocast
from flashcore.packed import (
    check_packed,
    checked_max_seqlen,
    packed_backward,
    packed_problem,
    run_packed,
)
from flashcore.problem import Causal, Problem, Window
from flashcore.spelling import OF_VARLEN, other_names, refuse
from flashcore.validation import (
    SEQLEN_MAX,
    check_return_lse,
    checked_causal,
    checked_factor,
    checked_window,
)

__all__ = ["attention_varlen"]

Tensor = torch.Tensor

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, str causal, int window_left, int window_right, float softcap, "
    "float? scale"
)
_LIBRARY = torch.library.Library("flashcore", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY.define(
    f"attention_varlen_forward({_ARGUMENTS}, str backend) -> (Tensor, Tensor)", tags=_TAGS
)
_LIBRARY.define(
    "attention_varlen_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
forward = torch.ops.flashcore.attention_varlen_forward.default
backward = torch.ops.flashcore.attention_varlen_backward.default


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    return_lse: bool,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


@other_names(OF_VARLEN)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **_unknown: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of sequences of different lengths, packed one after the other, in one launch.

    Sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and keys cu_seqlens_k[b] to
    cu_seqlens_k[b + 1]; it may have none of either. The lengths stay on the device: nothing waits
    for them, so nothing can check them either. Entries are clamped to the tensors, and whatever
    they hold, nothing outside of the tensors is touched; if they do not grow from 0, results are
    unspecified. Rows behind the last sequence get out 0 and lse -inf.

    Args:
        q: [total_q, num_heads_q, head_dim]. Any strides (a slice of packed qkv too) and any
            head_dim, as in `attention`.
        k: [total_k, num_heads_kv, head_dim], dtype and device of q. num_heads_q must be a multiple
            of num_heads_kv.
        v: [total_k, num_heads_kv, head_dim_v], likewise; head_dim_v may differ.
        cu_seqlens_q: int32, [batch + 1], on q's device, contiguous: 0, then each sequence's end.
        cu_seqlens_k: likewise of the keys.
        max_seqlen_q: the longest sequence of queries, in tokens. It helps to choose tiles; results
            do not depend on it.
        max_seqlen_k: likewise of the keys.
        causal: as in `attention`, for each sequence by its own lengths.
        scale: as in `attention`.
        window: as in `attention`, likewise.
        softcap: as in `attention`.
        return_lse: also return the log-sum-exp of each row of scores.
        backend: as in `attention`.

    Returns:
        out: [total_q, num_heads_q, head_dim_v], dtype of q. With return_lse, the pair (out, lse):
        lse is natural-log, float32 (float64 for float64 inputs), [num_heads_q, total_q]. A row with
        nothing to attend to has out 0, lse -inf and zero gradients.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: an unsupported tensor layout or device type; a head_dim above 256 with
            a kernel as the backend; or the gradient of a gradient.
        BackendUnavailableError: the backend cannot run here: no GPU, or one older than sm_75.

    Numerics:
        As `attention`, sequence by sequence. The backward pass runs in PyTorch and does read the
        lengths: on a GPU it waits for them.

    Source:
        FlashAttention-2, arXiv:2307.08691; the layout is that of its library's varlen functions.
    """
    if _unknown:
        refuse(attention_varlen, _unknown)
    q, k, v, _ = autocast(q, k, v, None)
    lengths = cu_seqlens_q, cu_seqlens_k
    if type(max_seqlen_q) is type(max_seqlen_k) is int and is_plain(lengths, q, k, v, None):

        def describe() -> Problem:
            check_return_lse(return_lse)
            return packed_problem(
                q, k, v, *lengths, *longest, causal=causal, scale=scale, window=window,
                softcap=softcap,
            )  # fmt: skip

        asked, longest = (causal, window, softcap, scale, return_lse), (max_seqlen_q, max_seqlen_k)
        result = attend_lengths(q, k, v, None, lengths, asked, longest, backend, describe)
        if result is not None:
            return result if return_lse else result[0]
    if not torch.compiler.is_compiling():  # then _forward_fake checks
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    left, right = (-1 if size > SEQLEN_MAX else size for size in checked_window(window))
    if scale is not None:
        scale = checked_factor("scale", scale, 1.0, "pass None for 1 / sqrt(head_dim)")
    check_return_lse(return_lse)
    if not isinstance(backend, str):
        raise TypeError(f"backend must be one of {', '.join(BACKENDS)}, but is {backend!r}")
    out, lse = forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        checked_max_seqlen("max_seqlen_q", max_seqlen_q),
        checked_max_seqlen("max_seqlen_k", max_seqlen_k),
        checked_causal(causal),
        left,
        right,
        checked_factor("softcap", softcap, 0.0, "pass None for no softcap"),
        scale,
        backend,
    )
    return (out, lse) if return_lse else out


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float | None,
) -> Problem:
    return packed_problem(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=False if causal == "none" else causal,
        window=(window_left, window_right),
        softcap=softcap or None,
        scale=scale,
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *options, backend = options  # type: ignore[assignment]
    problem = _problem(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    choice = choose_backend(problem, backend)
    if choice.is_fallback:
        warn_once(choice)
    return run_packed(choice.backend, problem, q, k, v, cu_seqlens_q, cu_seqlens_k)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    total_q, num_heads_q, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((total_q, num_heads_q, v.shape[2]))
    return out, q.new_empty((num_heads_q, total_q), dtype=lse_dtype)


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *_ = arguments
    problem = _problem(*arguments)
    return packed_backward(problem, dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse)


def _backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_forward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.options = inputs[5:12]
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.set_materialize_grads(False)


def _forward_gradient(ctx, dout: Tensor | None, dlse: Tensor | None):  # type: ignore[no-untyped-def]
    gradients = backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
    needs = ctx.needs_input_grad[:3]
    pairs = zip(gradients, needs, strict=True)
    return *(gradient if need else None for gradient, need in pairs), *(None,) * 10


def _backward_gradient(ctx, *cotangents: Tensor | None):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "the gradient of attention_varlen's gradient is not implemented; call flashcore.attention "
        "for each sequence"
    )


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("attention_varlen_forward", _forward, _device)
    _LIBRARY.impl("attention_varlen_backward", _backward, _device)
torch.library.register_fake(forward, _forward_fake, lib=_LIBRARY)
torch.library.register_fake(backward, _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    forward, _forward_gradient, setup_context=_setup_forward, lib=_LIBRARY
)
torch.library.register_autograd(backward, _backward_gradient, lib=_LIBRARY)
