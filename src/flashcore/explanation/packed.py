"""Explain how a call of `attention_varlen` would run, and why."""

from __future__ import annotations

import dataclasses
from typing import TextIO

from torch import Tensor

from flashcore.explanation.deciding import explained
from flashcore.explanation.found import Explanation, check_asked
from flashcore.explanation.gradient import gradient_of
from flashcore.ops.varlen import varlen_problem
from flashcore.problem import Causal, Window
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Inputs, Options, Wanted
from flashcore.problem.spelling import OF_VARLEN, other_names, refuse

__all__ = ["explain_varlen"]


@other_names(OF_VARLEN)
def explain_varlen(
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
    arch: int | None = None,
    file: TextIO | None = None,
    **_unknown: object,
) -> Explanation:
    """Print which backend, kernel and tile configuration `attention_varlen` would use, and why.

    Nothing is computed or compiled, and cu_seqlens is not read: plans depend on how many sequences
    and rows there are, and on the longest. See `explain`.

    Args:
        q: [total_q, num_heads_q, head_dim]; as in `attention_varlen`, like all that follow.
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32, [batch + 1].
        cu_seqlens_k: int32, [batch + 1].
        max_seqlen_q: the longest sequence of queries, or a bound on it.
        max_seqlen_k: the longest sequence of keys, or a bound on it.
        causal: False, True (aligned at the lower right) or "upper_left".
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.
        return_lse: whether the log-sum-exp of each row of scores is returned too.
        return_max_score: whether the largest score of each head of each sequence is, too.
        batch_invariant: whether a sequence's bits may depend on that sequence alone.
        deterministic: whether gradients have the same bits in every run.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        arch: GPU architecture to plan for, as in `explain`.
        file: where to print; by default standard output.

    Returns:
        The same as an object.

    Raises:
        Exception: what `attention_varlen` would raise for these arguments.
    """
    if _unknown:
        refuse(explain_varlen, _unknown)
    check_asked(arch, file)
    longest: tuple[int, int] = (max_seqlen_q, max_seqlen_k)  # type: ignore[assignment]
    inputs = Inputs(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=longest[0],
        max_seqlen_k=longest[1], sinks=sinks,
    )  # fmt: skip
    options = Options.checked(causal, window, softcap, scale, batch_invariant, deterministic)
    wanted = Wanted(return_lse, return_max_score).checked()
    problem = dataclasses.replace(varlen_problem(inputs, options), **wanted._asdict())
    tensors = as_batch(q), as_batch(k), as_batch(v)
    gradient = gradient_of(problem, backend, arch)
    return explained(problem, tensors, backend, arch, gradient).printed(file)
