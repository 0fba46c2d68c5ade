"""`attention_varlen` computes sequences of different lengths, packed one after the other; as
operators of torch, `flashcore::attention_varlen_forward` and
`flashcore::attention_varlen_backward`."""

from __future__ import annotations

import dataclasses
from typing import Literal, overload

import torch
from torch.compiler import is_dynamo_compiling

from flashcore.backends.dispatch import choose_backend, warn_once
from flashcore.backends.packed import (
    check_packed,
    checked_max_seqlen,
    of_packed,
    packed_backward,
    packed_problem,
    run_packed,
)
from flashcore.backends.sinks import packed_gradient_of_sinks
from flashcore.ops import flops
from flashcore.ops.dense import autocast
from flashcore.ops.eager import Recording, is_plain, recorder
from flashcore.ops.family import Family, Gradients
from flashcore.ops.length_calls import attend_lengths
from flashcore.ops.operators import Operators
from flashcore.plain.lengths import (
    varlen_backward_plain,
    varlen_forward_plain,
    varlen_second_order,
)
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.options import Inputs, Options, Results, Wanted
from flashcore.problem.spelling import OF_VARLEN, other_names, refuse
from flashcore.problem.validation import check_sinks

__all__ = ["attention_varlen"]

Tensor = torch.Tensor
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # looked up once, not in every call


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    return_max_score: Literal[False] = ...,
    batch_invariant: bool = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    return_max_score: Literal[False] = ...,
    batch_invariant: bool = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
    return_max_score: Literal[False] = ...,
    batch_invariant: bool = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool = ...,
    return_max_score: bool = ...,
    batch_invariant: bool = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, ...]: ...


@other_names(OF_VARLEN)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    return_max_score: bool = False,
    batch_invariant: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
    **_unknown: object,
) -> Tensor | tuple[Tensor, ...]:
    """Compute `attention` of sequences of different lengths, packed one after the other, in one
    launch.

    Sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and keys cu_seqlens_k[b] to
    cu_seqlens_k[b + 1]; it may have none of either. The lengths stay on the device: nothing waits
    for them, so nothing can check them either. Entries are clamped to the tensors, and whatever
    they hold, nothing outside of the tensors is touched; if they do not grow from 0, results are
    unspecified. Rows behind the last sequence are such with nothing to attend to.

    Args:
        q: [total_q, num_heads_q, head_dim]. Any strides (a slice of packed qkv too) and any
            head_dim, as in `attention`.
        k: [total_k, num_heads_kv, head_dim], dtype and device of q. num_heads_q must be a multiple
            of num_heads_kv.
        v: [total_k, num_heads_kv, head_dim_v], dtype and device of q; head_dim_v may
            differ from head_dim.
        cu_seqlens_q: int32, [batch + 1], on q's device, contiguous: 0, then each sequence's end.
        cu_seqlens_k: int32, [batch + 1]: where the sequences of keys end.
        max_seqlen_q: the longest sequence of queries, in tokens, or a bound on it. It helps to
            choose tiles; results do not depend on it. An int, or an integer tensor with one
            element, which is never waited for: on a GPU, and in compiled code, it counts as
            total_q, so an int may be faster.
        max_seqlen_k: the longest sequence of keys, or a bound on it, as max_seqlen_q is.
        causal: False, True or "upper_left", for each sequence by its own lengths.
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), for each sequence by its own lengths, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        sinks: [num_heads_q], float32 or the dtype of q, or None: a logit of each head that joins
            the softmax and has no value, as in `attention`.
        return_lse: also return the log-sum-exp of each row of scores.
        return_max_score: also return the largest score of each head of each sequence.
        batch_invariant: give each sequence the same bits whatever is packed beside it, as in
            `attention`.
        deterministic: as in `attention`; without effect so far, for the kernels that compute
            gradients of packed sequences add nothing up between blocks.
        backend: "auto", "sm90", "wmma", "sim" or "torch".

    Returns:
        out: [total_q, num_heads_q, head_dim_v], dtype of q. With return_lse, the pair (out, lse):
        lse is natural-log, float32 (float64 for float64 inputs), [num_heads_q, total_q]. A row with
        nothing to attend to has out 0, lse -inf, or with sinks the sink, and gives q, k and v zero
        gradients. With return_max_score, max_score comes last: dtype of lse, [num_sequences,
        num_heads_q], see `attention`.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: an unsupported tensor layout or device type; a head_dim above 256 with
            a kernel as the backend.
        BackendUnavailableError: the backend cannot run here: no GPU, or one older than sm_75.

    Numerics:
        As `attention`, sequence by sequence. Where neither the fused kernels nor one of torch's
        operators computes the gradients (docs/varlen.md), the host reads the lengths for them: on
        a GPU it waits.

    Source:
        FlashAttention-2, arXiv:2307.08691; the layout is that of its library's varlen functions.
    """
    if _unknown:
        refuse(attention_varlen, _unknown)
    if is_dynamo_compiling() or _is_any_autocast_enabled():
        q, k, v, _, sinks = autocast(q, k, v, None, sinks)
    lengths = cu_seqlens_q, cu_seqlens_k
    if type(max_seqlen_q) is type(max_seqlen_k) is int and is_plain(
        lengths, q, k, v, None, sinks, sinks is None
    ):

        def describe() -> Problem:
            return packed_problem(
                q, k, v, *lengths, *longest, causal=causal, scale=scale, window=window,
                softcap=softcap, sinks=sinks, batch_invariant=batch_invariant,
                deterministic=deterministic,
            )  # fmt: skip

        asked = causal, window, softcap, scale, return_lse, return_max_score
        longest = max_seqlen_q, max_seqlen_k
        result = attend_lengths(
            q, k, v, None, lengths, sinks, asked, longest, backend, describe, batch_invariant,
            record=_record if sinks is None else None, deterministic=deterministic,
        )  # fmt: skip
        if result is not None:
            return result
    if not torch.compiler.is_compiling():  # then the operator's fake checks
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    inputs = Inputs(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=checked_max_seqlen("max_seqlen_q", max_seqlen_q, q.shape[0]),
        max_seqlen_k=checked_max_seqlen("max_seqlen_k", max_seqlen_k, k.shape[0]),
        sinks=sinks,
    )
    options = Options.checked(causal, window, softcap, scale, batch_invariant, deterministic)
    returned: Tensor | tuple[Tensor, ...] = OPERATORS.attend(
        inputs, options, Wanted(return_lse, return_max_score), backend
    )
    return returned


def _check(inputs: Inputs) -> None:
    check_packed(*of_packed(inputs)[:5])
    if inputs.sinks is not None:
        check_sinks(inputs.sinks, inputs.q, inputs.q.shape[1])


def _shapes(inputs: Inputs) -> Results:
    total_q, num_heads_q, _ = inputs.q.shape
    return Results(
        out=(total_q, num_heads_q, inputs.v.shape[2]),
        lse=(num_heads_q, total_q),
        max_score=(inputs.cu_seqlens_q.shape[0] - 1, num_heads_q),  # type: ignore[union-attr]
    )


def varlen_problem(inputs: Inputs, options: Options) -> Problem:
    """Validate the tensors of packed sequences and describe them.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention_varlen`.
    """
    return packed_problem(*of_packed(inputs), **options.asked(), sinks=inputs.sinks)


def _compute(inputs: Inputs, options: Options, wanted: Wanted, backend: str) -> Results:
    problem = varlen_problem(inputs, options)
    problem = dataclasses.replace(problem, return_max_score=wanted.return_max_score)
    choice = choose_backend(problem, backend)
    if choice.is_fallback:
        warn_once(choice)
    return run_packed(choice.backend, problem, inputs)


def _differentiate(
    arriving: Results,
    inputs: Inputs,
    results: Results,
    options: Options,
    needs: tuple[bool, ...],
    backend: str,
) -> Gradients:
    problem = packed_problem(*of_packed(inputs), **options.asked())
    gradients = packed_backward(problem, arriving, inputs, results, backend)
    (needs_sinks_grad,) = needs
    dsinks = packed_gradient_of_sinks(inputs, results, arriving) if needs_sinks_grad else None
    return *gradients, dsinks


_HEADS = 1  # of [total, num_heads, head_dim]

OPERATORS = Operators(
    Family(
        name="attention_varlen",
        inputs=(
            "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "sinks",
        ),
        differentiable=("q", "k", "v", "sinks"),
        places={
            "q": _HEADS, "k": _HEADS, "v": _HEADS, "cu_seqlens_q": None, "cu_seqlens_k": None,
            "sinks": 0, "out": _HEADS, "lse": 0, "max_score": _HEADS,
        },
        check=_check,
        compute=_compute,
        differentiate=_differentiate,
        shapes=_shapes,
        plain=varlen_forward_plain,
        differentiate_plain=varlen_backward_plain,
        second_order=varlen_second_order,
        scores=flops.packed_scores,
    )
)  # fmt: skip


def _problem_of_packed(inputs: Inputs, options: Options) -> Problem:
    return packed_problem(*of_packed(inputs), **options.asked())


_record = recorder(Recording(OPERATORS, _problem_of_packed, ("cu_seqlens_q", "cu_seqlens_k")))
