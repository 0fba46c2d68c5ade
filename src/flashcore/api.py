"""This module has the public functions: `attention`, and `explain`, which says how attention would
run."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch.compiler import is_dynamo_compiling

from flashcore.explanation import Explanation, explain
from flashcore.launch import launcher
from flashcore.ops.calls import attend
from flashcore.ops.dense import attention_dense, autocast
from flashcore.ops.eager import attention_with_sinks, needs_dispatcher, record
from flashcore.ops.padded import attend_padded, attention_padded
from flashcore.problem import Causal, Window
from flashcore.problem.options import Inputs
from flashcore.problem.ranks import as_rank_4, has_other_rank
from flashcore.problem.scales import check_has_lengths
from flashcore.problem.spelling import OF_ATTENTION, other_names, refuse

__all__ = ["Explanation", "attention", "explain"]

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # looked up once, not in every call


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    k_scale: torch.Tensor | None = ...,
    v_scale: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    return_max_score: Literal[False] = ...,
    batch_invariant: bool = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    k_scale: torch.Tensor | None = ...,
    v_scale: torch.Tensor | None = ...,
    return_lse: Literal[True],
    return_max_score: Literal[False] = ...,
    batch_invariant: bool = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    k_scale: torch.Tensor | None = ...,
    v_scale: torch.Tensor | None = ...,
    return_lse: bool,
    return_max_score: Literal[False] = ...,
    batch_invariant: bool = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = ...,
    scale: float | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    k_scale: torch.Tensor | None = ...,
    v_scale: torch.Tensor | None = ...,
    return_lse: bool = ...,
    return_max_score: bool = ...,
    batch_invariant: bool = ...,
    deterministic: bool = ...,
    backend: str = ...,
) -> torch.Tensor | tuple[torch.Tensor, ...]: ...


@other_names(OF_ATTENTION)
def attention(
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
    **_unknown: object,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Compute scaled dot-product attention, softmax(scale * q @ k^T) @ v, without storing the
    scores.

    Works on float16 and bfloat16 tensors on a GPU by a fused kernel, and on CPU tensors (float32
    and float64 too) by PyTorch operations with the same meaning. Differentiable in q, k, v, sinks
    and an additive mask, also through lse.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim]. Any strides, 0 from `expand` too:
            `x.transpose(1, 2)` of a [batch, seqlen, num_heads, head_dim] tensor is read in place.
            Any head_dim; the kernels serve up to 256. Where it is no multiple of 8, or the last
            dimension is not contiguous, they are given padded copies. q, k and v may all lack the
            batch dimension, or have several.
        k: [batch, num_heads_kv, seqlen_k, head_dim], dtype and device of q. num_heads_q must be a
            multiple of num_heads_kv; q's head h uses head h // (num_heads_q / num_heads_kv).
        v: [batch, num_heads_kv, seqlen_k, head_dim_v], dtype and device of q; head_dim_v may
            differ from head_dim.
        causal: True or "lower_right": query i sees keys up to i + seqlen_k - seqlen_q, so the last
            query sees all. "upper_left": up to key i, as torch's is_causal. False: all.
        scale: multiplies q.k; a positive number, by default 1 / sqrt(head_dim).
        window: (left, right): a query sees at most `left` keys before and `right` after the one
            it is aligned with (as for causal, lower_right unless causal is "upper_left");
            -1 is unbounded. With causal, right counts as 0.
        softcap: a positive number c turns each scaled score s into c * tanh(s / c).
        mask: boolean (True = attend) or additive (dtype of q, or float32; added to the scores after
            scale and softcap), broadcastable to [batch, num_heads_q, seqlen_q, seqlen_k]. Read
            through its strides, never expanded.
        seqlens_k: int32, [batch], on q's device: sequence b has the first seqlens_k[b] keys and
            values (clamped to 0 and seqlen_k), the rest is not read, and causal masks and windows
            are aligned as if it were not there. The forward pass never waits for it; the backward
            pass does, and a mask gets no gradient then. See docs/varlen.md.
        sinks: [num_heads_q], float32 or the dtype of q: a logit of each head that joins the softmax
            of each of its rows and has no value, lse = log(sum(exp(score)) + exp(sink)). Taken as
            it is: neither scaled nor soft-capped nor masked. -inf is none. Where sinks need a
            gradient, the backward pass computes it. See docs/sinks.md.
        k_scale: float32, where k and v are a cache of 8 bits, float8_e4m3fn, which needs seqlens_k:
            an element counts times its scale, of shape [], [num_heads_kv] or [batch, num_heads_kv].
            Positive, and on q's device. There is no gradient then. See docs/serving.md.
        v_scale: likewise, of v.
        return_lse: also return the log-sum-exp of each row of scores.
        return_max_score: also return the largest score of each head, as QK-clip needs it.
        batch_invariant: give each sequence the same bits whatever is beside it: other sequences,
            their number, lengths and order, and how much room a padded cache has. Of the forward
            pass; slower, see docs/serving.md.
        deterministic: give gradients the same bits in every run. False lets the backward pass add
            up dq in any order where that is expected to be faster: on Hopper, where one kernel
            computes dq, dk and dv, above head_dim 96 from 2048 queries on. Elsewhere it has no
            effect, nor while torch.use_deterministic_algorithms is on. See docs/backward.md.
        backend: "auto" (by device and dtype), "sm90" (the Hopper kernel), "wmma" (the portable
            tensor-core kernel), "sim" (a kernel in the simulator, on CPU tensors), or "torch"
            (PyTorch operations).

    Returns:
        out: [batch, num_heads_q, seqlen_q, head_dim_v], dtype of q. With return_lse, the pair
        (out, lse): lse is natural-log, float32 (float64 for float64 inputs), [batch, num_heads_q,
        seqlen_q]. A row with nothing to attend to has out 0 and lse -inf, or with sinks the sink,
        and gives q, k, v and the mask zero gradients. With return_max_score, max_score comes last:
        the largest of what enters the softmax (scaled, soft-capped, with the additive mask; hidden
        keys and sinks do not count), dtype of lse, [batch, num_heads_q], -inf where a head sees no
        key. It has no gradient.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: an unsupported tensor layout or device type; a head_dim above 256 with
            a kernel as the backend.
        BackendUnavailableError: the backend cannot run here: no GPU, or one older than sm_75.

    Numerics:
        Scores, softmax and sums are float32 (float64 for float64 inputs) and only the result is
        rounded; the kernels also round the softmax weights to the dtype of v. See docs/numerics.md.

    Source:
        FlashAttention-2, arXiv:2307.08691, algorithm 1 (forward) and 2 (backward).
    """
    if _unknown:
        refuse(attention, _unknown)
    if is_dynamo_compiling():
        q, k, v, mask, sinks = autocast(q, k, v, mask, sinks)
    else:
        is_usual = sinks is None and batch_invariant is False
        has_scales = k_scale is not None or v_scale is not None
        if (
            launcher.attend is not None
            and is_usual
            and not has_scales
            and return_max_score is False
        ):
            result: torch.Tensor | tuple[torch.Tensor, ...] | None = launcher.attend(
                q,
                k,
                v,
                mask,
                causal,
                window,
                softcap,
                scale,
                seqlens_k,
                return_lse,
                backend,
                deterministic,
                None,
            )
            if result is not None:
                return result
        if _is_any_autocast_enabled():
            q, k, v, mask, sinks = autocast(q, k, v, mask, sinks)
        if is_usual and not needs_dispatcher(q, k, v, mask):
            if seqlens_k is None and not has_scales:
                return attend(
                    q, k, v, mask, causal, window, softcap, scale, return_lse, backend, record,
                    None, return_max_score, deterministic,
                )  # fmt: skip
            if seqlens_k is not None and deterministic is True and not has_other_rank(q, k, v):
                asked = causal, window, softcap, scale, return_lse, return_max_score
                return attend_padded(q, k, v, mask, seqlens_k, asked, backend, k_scale, v_scale)
    if has_other_rank(q, k, v):
        given = as_rank_4(q, k, v, mask, seqlens_k)
        inputs = Inputs(*given[:5], sinks=sinks, k_scale=k_scale, v_scale=v_scale)
        return given.restored(
            _by_operator(
                inputs,
                causal,
                window,
                softcap,
                scale,
                return_lse,
                return_max_score,
                backend,
                batch_invariant,
                deterministic,
            )
        )
    inputs = Inputs(q, k, v, mask, seqlens_k, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    return _by_operator(
        inputs, causal, window, softcap, scale, return_lse, return_max_score, backend,
        batch_invariant, deterministic,
    )  # fmt: skip


def _by_operator(
    inputs: Inputs,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    return_max_score: bool,
    backend: str,
    batch_invariant: bool,
    deterministic: bool,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    compute = attention_dense if inputs.sinks is None else attention_with_sinks
    check_has_lengths(inputs)
    if inputs.seqlens_k is not None:
        compute = attention_padded
    return compute(
        inputs, causal, window, softcap, scale, return_lse, return_max_score, backend,
        batch_invariant, deterministic,
    )  # fmt: skip
