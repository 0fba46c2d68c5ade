"""Explain how a call of `attention` would run, and why."""

from __future__ import annotations

import dataclasses
from typing import TextIO

import torch

from flashcore.explanation.deciding import explained
from flashcore.explanation.found import Explanation, check_asked
from flashcore.explanation.gradient import gradient_of, no_gradient
from flashcore.ops.family import refuse_gradients, why_no_gradient
from flashcore.ops.padded import OPERATORS as PADDED
from flashcore.ops.padded import padded_problem
from flashcore.problem import Causal, Window
from flashcore.problem.options import Inputs, Options, Wanted
from flashcore.problem.ranks import as_rank_4, has_other_rank
from flashcore.problem.scales import check_has_lengths
from flashcore.problem.spelling import OF_ATTENTION, other_names, refuse


@other_names(OF_ATTENTION)
def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    return_max_score: bool = False,
    batch_invariant: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
    arch: int | None = None,
    file: TextIO | None = None,
    **_unknown: object,
) -> Explanation:
    """Print which backend, kernel and tile configuration `attention` would use, and why.

    Nothing is computed or compiled, and no length on a device is read. `explain_varlen` and
    `explain_with_kvcache` say the same of `attention_varlen` and `attention_with_kvcache`.

    Args:
        q: as in `attention`, like all the arguments that follow.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        causal: False, True (aligned at the lower right) or "upper_left".
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        seqlens_k: int32, [batch]: how many keys each sequence has; or None.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.
        k_scale: float32, where k and v are a cache of 8 bits; or None.
        v_scale: likewise, of v.
        return_lse: whether the log-sum-exp of each row of scores is returned too.
        return_max_score: whether the largest score of each head is returned too.
        batch_invariant: whether a sequence's bits may depend on that sequence alone.
        deterministic: whether gradients have the same bits in every run.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        arch: GPU architecture to plan for, 90 for sm_90; by default that of q's device, and what
            the simulator runs for CPU tensors.
        file: where to print; by default standard output.

    Returns:
        The same as an object.

    Raises:
        Exception: what `attention` would raise for these arguments.
    """
    if _unknown:
        refuse(explain, _unknown)
    check_asked(arch, file)
    is_ranked = has_other_rank(q, k, v)
    if is_ranked:
        q, k, v, mask, seqlens_k, _ = as_rank_4(q, k, v, mask, seqlens_k)
    inputs = Inputs(q, k, v, mask, seqlens_k, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    check_has_lengths(inputs)
    options = Options.checked(causal, window, softcap, scale, batch_invariant, deterministic)
    wanted = Wanted(return_lse, return_max_score).checked()
    if seqlens_k is None:
        problem = options.problem(q, k, v, mask, return_lse, sinks)
    else:
        problem = padded_problem(inputs, options)
        if torch.is_grad_enabled():
            refuse_gradients(PADDED.family, inputs)
    problem = dataclasses.replace(problem, **wanted._asdict())
    why_none = why_no_gradient(inputs)
    if why_none is not None:
        gradient = no_gradient(why_none)
    else:
        elements = mask.numel() if mask is not None and mask.requires_grad else 0
        gradient = gradient_of(problem, backend, arch, elements)
    notes = [f"q, k and v are taken as [{problem.batch}, ...], of four dimensions"]
    return explained(
        problem, (q, k, v), backend, arch, gradient, notes=notes if is_ranked else ()
    ).printed(file)
