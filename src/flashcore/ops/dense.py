"""Define attention as operators of torch: `flashcore::attention_forward`,
`flashcore::attention_backward`.

An eager call on plain tensors does without them (ops/eager.py). They serve whoever must see a call
as one node of a graph or take it apart: torch.compile, torch.export, torch.func, modes, subclasses.
Their arguments are plain values; what depends on sizes, which may be symbolic, is checked when they
run, and only kinds (rank, dtype, device) when they are traced.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashcore.backends.autocasting import autocast_dtype
from flashcore.backends.dispatch import KERNELS, choose_backend, prepare, warn_once
from flashcore.backends.gradients import attention_gradients
from flashcore.backends.sinks import as_logits, gradient_of_sinks
from flashcore.ops import flops
from flashcore.ops.calls import attend
from flashcore.ops.family import Family, Gradients
from flashcore.ops.operators import Operators
from flashcore.plain.attention import backward_plain, forward_plain, largest
from flashcore.plain.second_order import backward_of_backward
from flashcore.problem import Causal, Window
from flashcore.problem.options import Inputs, Options, Results, Wanted
from flashcore.problem.scales import is_float8
from flashcore.problem.validation import (
    check_kinds,
    check_mask,
    check_mask_kind,
    check_qkv,
    check_sinks,
)


def autocast(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the tensors as torch.autocast wants them for SDPA: in its dtype, float64 as it is. A
    float32 mask is read as it is, and so are float32 sinks."""
    device = q.device.type if isinstance(q, Tensor) else "cpu"
    dtype = autocast_dtype(device)
    if dtype is None:
        return q, k, v, mask, sinks

    def cast(x: Tensor, keep: torch.dtype = torch.float64) -> Tensor:
        if not isinstance(x, Tensor) or x.device.type != device or not x.is_floating_point():
            return x
        if is_float8(x):  # what its elements count, their scale says
            return x
        return x if x.dtype in (torch.float64, keep) else x.to(dtype)

    mask = None if mask is None else cast(mask, torch.float32)
    sinks = None if sinks is None else cast(sinks, torch.float32)
    return cast(q), cast(k), cast(v), mask, sinks


def attention_dense(
    inputs: Inputs,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    return_max_score: bool,
    backend: str,
    batch_invariant: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, ...]:
    """Compute `attention` through the operator. torch.compile traces this function."""
    options = Options.checked(causal, window, softcap, scale, batch_invariant, deterministic)
    returned: Tensor | tuple[Tensor, ...] = OPERATORS.attend(
        inputs, options, Wanted(return_lse, return_max_score), backend
    )
    return returned


def check(inputs: Inputs) -> None:
    """Raise unless ranks, dtypes and devices fit, whatever the sizes."""
    check_kinds(inputs.q, inputs.k, inputs.v)
    if inputs.mask is not None:
        check_mask_kind(inputs.mask, inputs.q)
    if inputs.sinks is not None:
        check_sinks(inputs.sinks, inputs.q, inputs.q.shape[1])


def check_sizes(inputs: Inputs) -> None:
    """Raise unless sizes fit, too."""
    check_qkv(inputs.q, inputs.k, inputs.v)
    if inputs.mask is not None:
        check_mask(inputs.mask, inputs.q, inputs.k.shape[2])


def shapes(inputs: Inputs) -> Results:
    """Return the shapes of the results."""
    rows = inputs.q.shape[:3]
    return Results(out=(*rows, inputs.v.shape[3]), lse=rows, max_score=rows[:2])


def _compute(inputs: Inputs, options: Options, wanted: Wanted, backend: str) -> Results:
    q, k, v, mask, *_ = inputs
    sinks = inputs.sinks
    if sinks is not None or options.batch_invariant:
        problem = options.problem(q, k, v, mask, wanted.return_lse, sinks)
        problem = dataclasses.replace(problem, return_max_score=wanted.return_max_score)
        choice = choose_backend(problem, backend)
        if choice.is_fallback:
            warn_once(choice)
        others = () if sinks is None else (as_logits(sinks, problem.lse_dtype),)
        call = prepare(choice.backend, problem, q.device)
        if choice.backend in KERNELS and not problem.is_empty:
            addresses = tuple(x.data_ptr() for x in (q, k, v, *others))
            return Results(*call(q, k, v, mask, addresses))
        return Results(*call(q, k, v, mask, (), *others))
    causal, left, right, softcap, scale, *_ = options  # the others are no matter of this pass
    result = attend(
        q,
        k,
        v,
        mask,
        False if causal == "none" else True if causal == "lower_right" else causal,
        None if left == right == -1 else (left, right),
        softcap or None,
        scale,
        wanted.return_lse,
        backend,
        return_max_score=wanted.return_max_score,
    )
    return Results.of_returned(result, wanted)


def _differentiate(
    arriving: Results,
    inputs: Inputs,
    results: Results,
    options: Options,
    needs: tuple[bool, ...],
    backend: str,
) -> Gradients:
    q, k, v, mask, *_ = inputs
    needs_mask_grad, needs_sinks_grad = needs
    problem = options.problem(q, k, v, mask, return_lse=True)
    of_rows = results.out, results.lse, arriving.out, arriving.lse
    gradients = attention_gradients(
        problem, q, k, v, mask, *of_rows, needs_mask_grad, backend, inputs.sinks
    )
    dsinks = None
    if inputs.sinks is not None and needs_sinks_grad:
        dsinks = gradient_of_sinks(inputs.sinks, *of_rows)
    return *gradients, dsinks


def _plain(inputs: Inputs, options: Options) -> Results:
    check_sizes(inputs)
    q, k, v, mask, *_ = inputs
    out, lse, row_max = forward_plain(q, k, v, mask, options, sinks=inputs.sinks)
    return Results(out, lse, largest(row_max))


def _differentiate_plain(arriving: Results, inputs: Inputs, options: Options) -> Gradients:
    q, k, v, mask, *_ = inputs
    sinks = inputs.sinks
    return backward_plain(arriving.out, arriving.lse, q, k, v, mask, options, sinks=sinks)


def _second_order(
    arriving: Results, inputs: Inputs, cotangents: Gradients, options: Options
) -> Gradients:
    q, k, v, mask, *_ = inputs
    sinks = inputs.sinks
    return backward_of_backward(
        arriving.out, arriving.lse, q, k, v, mask, cotangents, options, sinks=sinks
    )


OPERATORS = Operators(
    Family(
        name="attention",
        inputs=("q", "k", "v", "mask", "sinks"),
        differentiable=("q", "k", "v", "mask", "sinks"),
        places={
            "q": 0,
            "k": 0,
            "v": 0,
            "mask": "mask",
            "sinks": None,
            "out": 0,
            "lse": 0,
            "max_score": 0,
        },
        check=check,
        compute=_compute,
        differentiate=_differentiate,
        shapes=shapes,
        plain=_plain,
        differentiate_plain=_differentiate_plain,
        second_order=_second_order,
        scores=flops.dense_scores,
    )
)
forward, backward = OPERATORS.forward, OPERATORS.backward
