"""Define `attention` with seqlens_k: a padded batch whose sequences have different numbers of keys.

Operators of torch: `flashcore::attention_padded_forward`, `flashcore::attention_padded_backward`.

The lengths lie on the device; the host reads them only where PyTorch itself computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

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
from flashcore.backends.gradients import attention_gradients, gradients_with_lengths
from flashcore.backends.packed import check_lengths
from flashcore.backends.sinks import as_logits, gradient_of_sinks, lse_of_no_keys
from flashcore.backends.tiled import attention_tiled
from flashcore.base import env
from flashcore.launch.allocation import unseen_scores
from flashcore.ops import dense, flops
from flashcore.ops.eager import Recording, is_plain, recorder
from flashcore.ops.family import Family, Gradients
from flashcore.ops.length_calls import RecordLengths, attend_lengths
from flashcore.ops.operators import Operators
from flashcore.ops.transforms.autograd import needs_grad
from flashcore.plain.lengths import (
    padded_backward_plain,
    padded_forward_plain,
    padded_second_order,
)
from flashcore.plain.trees import part_of_mask, part_of_tree
from flashcore.problem import Causal, Problem, Window, widest_band
from flashcore.problem.memory_layout import described_memory, mask_spec
from flashcore.problem.options import Inputs, Options, Results, Wanted
from flashcore.problem.scales import (
    as_wide,
    check_scales_of,
    dequantised,
    described_scales,
    part_of_scale,
    scales_of,
)
from flashcore.problem.validation import check_tree_mask, checked_window


def attend_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seqlens_k: Tensor,
    asked: tuple[Causal, Window, float | None, float | None, bool, bool],
    backend: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Compute `attention` with seqlens_k, and nothing else that is unusual but caches of 8 bits, of
    tensors that nobody else needs to see; `asked` is causal, window, softcap, scale, return_lse,
    return_max_score."""
    scales: Any = ()
    record: RecordLengths | None = _record
    if k_scale is not None or v_scale is not None:
        scales, record = (k_scale, v_scale), None
    if (
        type(seqlens_k) is Tensor
        and (mask is None or not needs_grad(mask))
        and (not scales or (type(k_scale) is type(v_scale) is Tensor and not needs_grad(q, k, v)))
    ):

        def describe() -> Problem:
            inputs = Inputs(q, k, v, mask, seqlens_k, k_scale=k_scale, v_scale=v_scale)
            return padded_problem(inputs, Options.checked(*asked[:4]))

        result = attend_lengths(
            q, k, v, mask, (seqlens_k,), None, asked, None, backend, describe, False, scales, record
        )
        if result is not None:
            return result
    inputs = Inputs(q, k, v, mask, seqlens_k, k_scale=k_scale, v_scale=v_scale)
    options = Options.checked(*asked[:4])
    return OPERATORS.attend(inputs, options, Wanted(*asked[4:]), backend)


def attention_padded(
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
    """Compute `attention` where seqlens_k is given; see there."""
    q, k, v, mask, seqlens_k, *_ = inputs
    sinks = inputs.sinks
    assert seqlens_k is not None
    is_tree = inputs.tree_mask is not None
    mask = inputs.tree_mask if is_tree else mask
    scales = tuple(scales_of(inputs).values())
    is_recorded = sinks is None and not scales and not is_tree  # if it is differentiated
    if is_plain((seqlens_k, *scales), q, k, v, mask, sinks, is_recorded):

        def describe() -> Problem:
            return padded_problem(inputs, Options.checked(*asked[:4], *flags))

        asked = causal, window, softcap, scale, return_lse, return_max_score
        flags = batch_invariant, deterministic
        result = attend_lengths(
            q, k, v, mask, (seqlens_k,), sinks, asked, None, backend, describe, batch_invariant,
            scales, _record if is_recorded else None, is_tree, deterministic,
        )  # fmt: skip
        if result is not None:
            return result
    options = Options.checked(causal, window, softcap, scale, batch_invariant, deterministic)
    return OPERATORS.attend(inputs, options, Wanted(return_lse, return_max_score), backend)


def check(inputs: Inputs) -> None:
    """Raise unless ranks, dtypes and devices fit."""
    q, seqlens_k = inputs.q, inputs.seqlens_k
    check_scales_of(inputs)
    dense.check(as_wide(inputs))
    check_tree_of(inputs)
    check_lengths("seqlens_k", seqlens_k, q)
    assert seqlens_k is not None
    if seqlens_k.shape[0] != q.shape[0]:
        raise ValueError(
            f"seqlens_k has {seqlens_k.shape[0]} entries, but q has batch {q.shape[0]}; it holds "
            "the number of keys of each sequence"
        )


def check_tree_of(inputs: Inputs) -> None:
    """Raise unless a tree_mask, if there is one, fits the queries and stands instead of a mask."""
    if inputs.tree_mask is None:
        return
    check_tree_mask(inputs.tree_mask, inputs.q)
    if inputs.mask is not None:
        raise ValueError(
            "mask and tree_mask are both given; kernels read one of them: pass mask with -inf, or "
            "False, where the tree hides a key"
        )


def padded_problem(inputs: Inputs, options: Options) -> Problem:
    """Validate the tensors of a padded batch and describe them.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`.
    """
    check(inputs)
    q, k, v, mask, *_ = inputs
    _, wide_k, wide_v, *_ = as_wide(inputs)
    asked = {**options.asked(), "window": None}
    problem = Problem.from_tensors(
        q, wide_k, wide_v, mask=mask, return_lse=True, sinks=inputs.sinks, **asked
    )
    window = checked_window((options.window_left, options.window_right))
    left, right = widest_band(options.causal, window, q.shape[2], k.shape[2])
    scales = described_scales(inputs)
    if inputs.tree_mask is not None:
        problem = dataclasses.replace(problem, mask=mask_spec(inputs.tree_mask, is_tree=True))
    return dataclasses.replace(
        problem,
        window_left=left,
        window_right=right,
        diag_offset=0,
        varlen="keys",
        **(scales and described_memory(q, k, v)),
        **scales,
    )


def _compute(inputs: Inputs, options: Options, wanted: Wanted, asked: str) -> Results:
    _, k, v, *_ = inputs

    def keys(b: slice, n: int) -> tuple[Tensor, Tensor]:
        return k[b, :, :n], v[b, :, :n]

    problem = padded_problem(inputs, options)
    return compute_lengths(problem, inputs, ("seqlens_k",), keys, wanted, asked)


def compute_lengths(
    problem: Problem,
    inputs: Inputs,
    names: tuple[str, ...],
    keys: Callable[[slice, int], tuple[Tensor, Tensor]],
    wanted: Wanted,
    asked: str,
) -> Results:
    """Compute sequences with seqlens_k on a backend.

    Args:
        problem: the description of the call.
        inputs: of the call.
        names: the fields of `inputs` that say where a sequence's keys are and how many, in the
            order of launch.LENGTHS.
        keys: returns k and v of one sequence, given its place in the batch and how many keys.
        wanted: besides out and lse.
        asked: the backend that was asked for.
    """
    q, k, v, mask, seqlens_k, *_ = inputs
    tree, sinks = inputs.tree_mask, inputs.sinks
    mask = mask if tree is None else tree
    assert seqlens_k is not None
    problem = dataclasses.replace(problem, return_max_score=wanted.return_max_score)
    choice = choose_backend(problem, asked)
    if choice.is_fallback:
        warn_once(choice)
    backend = choice.backend
    others = {name: getattr(inputs, name) for name in names}
    if sinks is not None:
        others["sinks"] = sinks = as_logits(sinks, problem.lse_dtype)
    others |= scales_of(inputs)
    if backend in KERNELS and not problem.is_empty:
        addresses = tuple(x.data_ptr() for x in (q, k, v, *others.values()))
        return Results(*prepare(backend, problem, q.device)(q, k, v, mask, addresses))
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=problem.lse_dtype)
    max_score = unseen_scores(problem, q) if problem.return_max_score else None
    if problem.is_empty or backend == "torch":
        out.zero_()
        lse_of_no_keys(lse, sinks)
        with without_autocast(problem.device):
            for own, b, n in _sequences(problem, seqlens_k):
                row_maxima = None if max_score is None else torch.empty_like(lse[b])
                of_k, of_v = keys(b, n)
                of_k = dequantised(of_k, part_of_scale(inputs.k_scale, b), lse.dtype)
                of_v = dequantised(of_v, part_of_scale(inputs.v_scale, b), lse.dtype)
                part = (
                    part_of_mask(mask, b, n)
                    if tree is None
                    else part_of_tree(tree, b, q.shape[2], n)
                )
                tensors = q[b], of_k, of_v, part
                out[b], lse[b] = attention_tiled(own, *tensors, row_maxima, sinks)
                if max_score is not None and row_maxima is not None:
                    max_score[b] = row_maxima.amax(2)
        return Results(out, lse, max_score)
    from flashcore.sim import simulate

    adapted = adapt_for(backend, problem)
    q, k, v, mask = adapted.tensors(q, k, v, mask)
    problem = adapted.problem
    if problem.head_dim_v != out.shape[3]:
        out = q.new_empty((*out.shape[:3], problem.head_dim_v))
    plan = plan_of(problem, env.sim_arch())
    seed = env.sim_seed()
    simulate(problem, plan, q, k, v, mask, out, lse, None, others, max_score=max_score, seed=seed)
    return Results(adapted.result(out), lse, max_score)


def _sequences(problem: Problem, seqlens_k: Tensor) -> Iterator[tuple[Problem, slice, int]]:
    """Yield each sequence that has keys: its Problem, its place in the batch, and how many keys."""
    if problem.is_empty:
        return
    for b, length in enumerate(seqlens_k.tolist()):
        n = min(max(0, length), problem.seqlen_k)
        if n:
            yield problem.of_sequence(problem.seqlen_q, n), slice(b, b + 1), n


def differentiate(
    arriving: Results,
    inputs: Inputs,
    results: Results,
    options: Options,
    needs: tuple[bool, ...],
    backend: str,
) -> Gradients:
    """Compute gradients; see Family."""
    q, k, v, mask, seqlens_k, *_ = inputs
    assert seqlens_k is not None
    dsinks = None
    if inputs.sinks is not None and any(needs):
        dsinks = gradient_of_sinks(
            inputs.sinks, results.out, results.lse, arriving.out, arriving.lse
        )
    problem = padded_problem(inputs._replace(sinks=None), options)
    fused = gradients_with_lengths(
        problem, q, k, v, mask, {"seqlens_k": seqlens_k}, results.out, results.lse, arriving.out,
        arriving.lse, backend,
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
            part_of_mask(mask, b, n),
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
        inputs=("q", "k", "v", "mask", "seqlens_k", "sinks", "k_scale", "v_scale", "tree_mask"),
        differentiable=("q", "k", "v", "sinks"),
        places={
            "q": 0, "k": 0, "v": 0, "mask": "mask", "seqlens_k": 0, "sinks": None,
            "k_scale": None, "v_scale": None, "tree_mask": "mask", "out": 0, "lse": 0,
            "max_score": 0,
        },
        check=check,
        compute=_compute,
        differentiate=differentiate,
        shapes=dense.shapes,
        plain=padded_forward_plain,
        differentiate_plain=padded_backward_plain,
        second_order=padded_second_order,
        scores=flops.dense_scores,
    )
)  # fmt: skip
_record = recorder(Recording(OPERATORS, padded_problem, ("seqlens_k",)))
