"""Define `attention` with seqlens_k: a padded batch whose sequences have different numbers of keys.

Operators of torch: `flashcore::attention_padded_forward`, `flashcore::attention_padded_backward`.

The lengths lie on the device; the host reads them only where PyTorch itself computes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import (
    KERNELS,
    adapt_for,
    check_backend,
    choose_backend,
    prepare,
    warn_once,
    without_autocast,
)
from flashcore.backends.gradients import attention_gradients, padded_gradients
from flashcore.backends.packed import check_lengths
from flashcore.backends.tiled import attention_tiled
from flashcore.base import env
from flashcore.kernels.fwd_wmma.plan import Plan, select_plan
from flashcore.ops import flops
from flashcore.ops.autograd import (
    functions_of_lengths,
    needs_mask_grad,
    refuse_mask_grad,
    register_autograd,
)
from flashcore.ops.batching_lengths import padded_backward_vmap, padded_forward_vmap
from flashcore.ops.calls import attend_lengths
from flashcore.ops.eager import is_plain
from flashcore.ops.plain_lengths import (
    padded_backward_plain,
    padded_forward_plain,
    padded_second_order,
)
from flashcore.problem import Causal, Problem, Window, widest_band
from flashcore.problem.options import Options
from flashcore.problem.validation import (
    check_kinds,
    check_mask_kind,
    check_return_lse,
    checked_window,
)

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor seqlens_k, str causal, "
    "SymInt window_left, SymInt window_right, Scalar softcap, Scalar? scale"
)
_LIBRARY = torch.library.Library("flashcore", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY.define(
    f"attention_padded_forward({_ARGUMENTS}, str backend) -> (Tensor, Tensor)", tags=_TAGS
)
_LIBRARY.define(
    "attention_padded_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
forward = torch.ops.flashcore.attention_padded_forward.default
backward = torch.ops.flashcore.attention_padded_backward.default


def attention_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seqlens_k: Tensor,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` where seqlens_k is given; see there."""
    if is_plain((seqlens_k,), q, k, v, mask):

        def describe() -> Problem:
            check_return_lse(return_lse)
            checked = Options.checked(causal, window, softcap, scale)
            return _problem(q, k, v, mask, seqlens_k, checked)

        asked = causal, window, softcap, scale, return_lse
        result = attend_lengths(q, k, v, mask, (seqlens_k,), asked, None, backend, describe)
        if result is not None:
            return result if return_lse else result[0]
    options = Options.checked(causal, window, softcap, scale)
    check_backend(backend)
    check_return_lse(return_lse)
    if not torch.compiler.is_compiling():  # then _forward_fake checks
        _check(q, k, v, mask, seqlens_k)
    if torch.is_grad_enabled() and needs_mask_grad(mask):
        refuse_mask_grad()
    out, lse = forward(q, k, v, mask, seqlens_k, *options, backend)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seqlens_k: Tensor) -> None:
    check_kinds(q, k, v)
    if mask is not None:
        check_mask_kind(mask, q)
    check_lengths("seqlens_k", seqlens_k, q)
    if seqlens_k.shape[0] != q.shape[0]:
        raise ValueError(
            f"seqlens_k has {seqlens_k.shape[0]} entries, but q has batch {q.shape[0]}; it holds "
            "the number of keys of each sequence"
        )


def _problem(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seqlens_k: Tensor, options: Options
) -> Problem:
    _check(q, k, v, mask, seqlens_k)
    causal = False if options.causal == "none" else options.causal
    problem = Problem.from_tensors(
        q,
        k,
        v,
        causal=causal,
        softcap=options.softcap or None,
        scale=options.scale,
        mask=mask,
        return_lse=True,
    )
    window = checked_window((options.window_left, options.window_right))
    left, right = widest_band(options.causal, window, q.shape[2], k.shape[2])
    return dataclasses.replace(
        problem, window_left=left, window_right=right, diag_offset=0, varlen="keys"
    )


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, arch: int, kernel: str | None) -> Plan:
    return select_plan(problem, arch, kernel=kernel)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seqlens_k: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *values, asked = options
    problem = _problem(q, k, v, mask, seqlens_k, Options(*values))
    choice = choose_backend(problem, asked)
    if choice.is_fallback:
        warn_once(choice)
    backend = choice.backend
    if backend in KERNELS and not problem.is_empty:
        addresses = tuple(x.data_ptr() for x in (q, k, v, seqlens_k))
        call = prepare(backend, problem, q.device)
        return call(q, k, v, mask, addresses)  # type: ignore[return-value]
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=problem.lse_dtype)
    if problem.is_empty or backend == "torch":
        out.zero_()
        lse.fill_(-math.inf)
        with without_autocast(problem.device):
            for own, b, n in _sequences(problem, seqlens_k):
                tensors = q[b], k[b, :, :n], v[b, :, :n], _part(mask, b, n)
                out[b], lse[b] = attention_tiled(own, *tensors)
        return out, lse
    from flashcore.sim import simulate

    adapted = adapt_for(backend, problem)
    q, k, v = adapted.tensors(q, k, v)
    problem = adapted.problem
    if problem.head_dim_v != out.shape[3]:
        out = q.new_empty((*out.shape[:3], problem.head_dim_v))
    plan = _plan(problem, env.sim_arch(), None)
    lengths = {"seqlens_k": seqlens_k}
    simulate(problem, plan, q, k, v, mask, out, lse, None, lengths, seed=env.sim_seed())
    return adapted.result(out), lse


def _sequences(problem: Problem, seqlens_k: Tensor) -> Iterator[tuple[Problem, slice, int]]:
    """Yield each sequence that has keys: its Problem, its place in the batch, and how many keys."""
    if problem.is_empty:
        return
    for b, length in enumerate(seqlens_k.tolist()):
        n = min(max(0, length), problem.seqlen_k)
        if n:
            yield problem.of_sequence(problem.seqlen_q, n), slice(b, b + 1), n


def _part(mask: Tensor | None, b: slice, n: int) -> Tensor | None:
    """Return a sequence's part of a mask that broadcasts."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[b] if mask.shape[0] > 1 else mask
    return mask[..., :n] if mask.shape[3] > 1 else mask


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seqlens_k: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask, seqlens_k)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seqlens_k: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(q, k, v, mask, seqlens_k, Options(*options))
    fused = padded_gradients(problem, q, k, v, mask, seqlens_k, out, lse, dout, dlse)
    if fused is not None:
        return fused
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with without_autocast(problem.device):
        for own, b, n in _sequences(problem, seqlens_k):
            dq[b], dk[b, :, :n], dv[b, :, :n], _ = attention_gradients(
                own,
                q[b],
                k[b, :, :n],
                v[b, :, :n],
                _part(mask, b, n),
                out[b],
                lse[b],
                None if dout is None else dout[b],
                None if dlse is None else dlse[b],
                False,
            )
    return dq, dk, dv


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


_Forward, _Backward = functions_of_lengths(forward, backward, padded_second_order)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("attention_padded_forward", _forward, _device)
    _LIBRARY.impl("attention_padded_backward", _backward, _device)
torch.library.register_fake(forward, _forward_fake, lib=_LIBRARY)
torch.library.register_fake(backward, _backward_fake, lib=_LIBRARY)
register_autograd(_LIBRARY, forward, _Forward, padded_forward_plain)
register_autograd(_LIBRARY, backward, _Backward, padded_backward_plain)
torch.library.register_vmap(forward, padded_forward_vmap, lib=_LIBRARY)
torch.library.register_vmap(backward, padded_backward_vmap, lib=_LIBRARY)
flops.register("attention_padded_forward", "attention_padded_backward")
