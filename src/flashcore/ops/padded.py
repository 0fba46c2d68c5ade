"""Define `attention` with seqlens_k: a padded batch whose sequences have different numbers of keys.

Operators of torch: `flashcore::attention_padded_forward`, `flashcore::attention_padded_backward`.

The lengths lie on the device; the host reads them only where PyTorch itself computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from flashcore.backends.dispatch import (
    KERNELS,
    adapt_for,
    choose_backend,
    plan_of,
    prepare,
    warn_once,
    without_autocast,
)
from flashcore.backends.gradients import attention_gradients, padded_gradients
from flashcore.backends.packed import check_lengths
from flashcore.backends.sinks import as_logits, gradient_of_sinks, lse_of_no_keys
from flashcore.backends.tiled import attention_tiled
from flashcore.base import env
from flashcore.ops import dense, flops
from flashcore.ops.calls import attend_lengths
from flashcore.ops.eager import is_plain
from flashcore.ops.family import Family, Gradients
from flashcore.ops.operators import Operators
from flashcore.plain.lengths import (
    padded_backward_plain,
    padded_forward_plain,
    padded_second_order,
)
from flashcore.problem import Causal, Problem, Window, widest_band
from flashcore.problem.options import Inputs, Options, Results, Wanted
from flashcore.problem.validation import check_return_lse, checked_window


def attention_padded(
    inputs: Inputs,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention` where seqlens_k is given; see there."""
    q, k, v, mask, seqlens_k, *_ = inputs
    sinks = inputs.sinks
    assert seqlens_k is not None
    if is_plain((seqlens_k,), q, k, v, mask, sinks):

        def describe() -> Problem:
            check_return_lse(return_lse)
            problem = padded_problem(inputs, Options.checked(causal, window, softcap, scale))
            return dataclasses.replace(problem, return_lse=return_lse)

        asked = causal, window, softcap, scale, return_lse
        lengths = (seqlens_k,)
        result = attend_lengths(q, k, v, mask, lengths, sinks, asked, None, backend, describe)
        if result is not None:
            return result if return_lse else result[0]  # type: ignore[return-value]
    options = Options.checked(causal, window, softcap, scale)
    returned: Tensor | tuple[Tensor, Tensor] = OPERATORS.attend(
        inputs, options, Wanted(return_lse), backend
    )
    return returned


def check(inputs: Inputs) -> None:
    """Raise unless ranks, dtypes and devices fit."""
    dense.check(inputs)
    q, seqlens_k = inputs.q, inputs.seqlens_k
    check_lengths("seqlens_k", seqlens_k, q)
    assert seqlens_k is not None
    if seqlens_k.shape[0] != q.shape[0]:
        raise ValueError(
            f"seqlens_k has {seqlens_k.shape[0]} entries, but q has batch {q.shape[0]}; it holds "
            "the number of keys of each sequence"
        )


def padded_problem(inputs: Inputs, options: Options) -> Problem:
    """Validate the tensors of a padded batch and describe them.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`.
    """
    check(inputs)
    q, k, v, mask, *_ = inputs
    sinks = inputs.sinks
    asked = {**options.asked(), "window": None}
    problem = Problem.from_tensors(q, k, v, mask=mask, return_lse=True, sinks=sinks, **asked)
    window = checked_window((options.window_left, options.window_right))
    left, right = widest_band(options.causal, window, q.shape[2], k.shape[2])
    return dataclasses.replace(
        problem, window_left=left, window_right=right, diag_offset=0, varlen="keys"
    )


def _compute(inputs: Inputs, options: Options, wanted: Wanted, asked: str) -> Results:
    q, k, v, mask, seqlens_k, *_ = inputs
    sinks = inputs.sinks
    assert seqlens_k is not None
    problem = padded_problem(inputs, options)
    others = {"seqlens_k": seqlens_k}
    if sinks is not None:
        others["sinks"] = sinks = as_logits(sinks, problem.lse_dtype)
    choice = choose_backend(problem, asked)
    if choice.is_fallback:
        warn_once(choice)
    backend = choice.backend
    if backend in KERNELS and not problem.is_empty:
        addresses = tuple(x.data_ptr() for x in (q, k, v, *others.values()))
        return Results(*prepare(backend, problem, q.device)(q, k, v, mask, addresses))
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=problem.lse_dtype)
    if problem.is_empty or backend == "torch":
        out.zero_()
        lse_of_no_keys(lse, sinks)
        with without_autocast(problem.device):
            for own, b, n in _sequences(problem, seqlens_k):
                tensors = q[b], k[b, :, :n], v[b, :, :n], _part(mask, b, n), sinks
                out[b], lse[b] = attention_tiled(own, *tensors)
        return Results(out, lse)
    from flashcore.sim import simulate

    adapted = adapt_for(backend, problem)
    q, k, v = adapted.tensors(q, k, v)
    problem = adapted.problem
    if problem.head_dim_v != out.shape[3]:
        out = q.new_empty((*out.shape[:3], problem.head_dim_v))
    plan = plan_of(problem, env.sim_arch())
    simulate(problem, plan, q, k, v, mask, out, lse, None, others, seed=env.sim_seed())
    return Results(adapted.result(out), lse)


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


def _differentiate(
    arriving: Results,
    inputs: Inputs,
    results: Results,
    options: Options,
    needs: tuple[bool, ...],
    backend: str,
) -> Gradients:
    q, k, v, mask, seqlens_k, *_ = inputs
    assert seqlens_k is not None
    dsinks = None
    if inputs.sinks is not None and needs[0]:
        dsinks = gradient_of_sinks(
            inputs.sinks, results.out, results.lse, arriving.out, arriving.lse
        )
    problem = padded_problem(inputs._replace(sinks=None), options)
    fused = padded_gradients(
        problem, q, k, v, mask, seqlens_k, results.out, results.lse, arriving.out, arriving.lse,
        backend,
    )  # fmt: skip
    if fused is not None:
        return *fused, dsinks
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for own, b, n in _sequences(problem, seqlens_k):
        dq[b], dk[b, :, :n], dv[b, :, :n], _ = attention_gradients(
            own,
            q[b],
            k[b, :, :n],
            v[b, :, :n],
            _part(mask, b, n),
            results.out[b],
            results.lse[b],
            None if arriving.out is None else arriving.out[b],
            None if arriving.lse is None else arriving.lse[b],
            False,
            backend,
        )
    return dq, dk, dv, dsinks


OPERATORS = Operators(
    Family(
        name="attention_padded",
        inputs=("q", "k", "v", "mask", "seqlens_k", "sinks"),
        differentiable=("q", "k", "v", "sinks"),
        places={
            "q": 0,
            "k": 0,
            "v": 0,
            "mask": "mask",
            "seqlens_k": 0,
            "sinks": None,
            "out": 0,
            "lse": 0,
        },
        check=check,
        compute=_compute,
        differentiate=_differentiate,
        shapes=dense.shapes,
        plain=padded_forward_plain,
        differentiate_plain=padded_backward_plain,
        second_order=padded_second_order,
        scores=flops.dense_scores,
    )
)
