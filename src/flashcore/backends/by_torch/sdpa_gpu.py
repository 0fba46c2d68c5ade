"""Compute float32, float64 and head_dims above 256 on a GPU, which no kernel here serves: by
torch's own attention, where it means the same and does not store all scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention

from flashcore.problem import Problem
from flashcore.problem.validation import HEAD_DIM_MAX

# Where torch has no memory-efficient kernel (float64, odd head_dims), it stores the scores, a few
# times over: 2**26 of them are 0.5 GB in float64. Beyond that they are computed tile by tile.
SCORES_MAX = 2**26
_WIDE_DTYPES = ("float32", "float64")


def means_the_same(problem: Problem) -> bool:
    """Return whether torch's SDPA can compute a problem on a GPU: no softcap, no window, no
    max_score, and causality at the upper left. A mask and causality exclude each other there, and
    so do a mask and lse, which sinks need (backends/sinks.py), besides a result that is not rounded
    to two bytes."""
    is_causal = problem.window_right == problem.diag_offset == 0
    has_no_kernel = (
        problem.dtype in _WIDE_DTYPES or max(problem.head_dim, problem.head_dim_v) > HEAD_DIM_MAX
    )
    needs_lse = problem.return_lse or problem.has_sinks
    return (
        problem.device == "cuda"
        and has_no_kernel
        and (problem.dtype in _WIDE_DTYPES or not problem.has_sinks)
        and not (problem.softcap or problem.return_max_score)
        and problem.window_left == -1
        and (is_causal or problem.window_right == -1)
        and (problem.mask is None or not (is_causal or needs_lse))
    )


def attention_by_sdpa(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """Compute a problem by torch's SDPA.

    Args:
        problem: the description of the call; see `means_the_same`.
        q: [batch, num_heads_q, seqlen_q, head_dim], on a GPU.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.

    Returns:
        out, [batch, num_heads_q, seqlen_q, head_dim_v], contiguous, and lse, [batch, num_heads_q,
        seqlen_q], or None where neither problem.return_lse nor sinks ask for it. None if it should
        be computed tile by tile.
    """
    is_causal = problem.window_right == 0
    k, v = _repeated(k, problem.group_size), _repeated(v, problem.group_size)
    bias = None if mask is None else _expanded(mask, problem)
    params = SDPAParams(q, k, v, bias, 0.0, is_causal, False)
    is_efficient = problem.dtype != "float64" and can_use_efficient_attention(params)
    if problem.return_lse or problem.has_sinks:
        if not is_efficient:
            return None
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, is_causal, scale=problem.scale
        )
        return out.contiguous(), lse[..., : problem.seqlen_q].contiguous()
    num_scores = problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k
    if not is_efficient and (num_scores > SCORES_MAX or problem.dtype not in _WIDE_DTYPES):
        return None
    # Not by torch.nn.functional's name, which enable() may have rebound to our own.
    out = torch._C._nn.scaled_dot_product_attention(
        q, k, v, bias, is_causal=is_causal, scale=problem.scale
    )
    if mask is not None:
        out = out.masked_fill(_empty_rows(mask), 0.0)  # torch's kernels differ on that
    return out.contiguous(), None


def _repeated(x: Tensor, times: int) -> Tensor:
    """Repeat every head so many times, as torch's memory-efficient kernel knows no groups."""
    if times == 1:
        return x
    batch, heads, seqlen, dim = x.shape
    x = x[:, :, None].expand(batch, heads, times, seqlen, dim)
    return x.reshape(batch, heads * times, seqlen, dim)


def _expanded(mask: Tensor, problem: Problem) -> Tensor:
    """Return a view of the shape of the scores, boolean or of the dtype of q."""
    mask = mask if mask.dtype == torch.bool else mask.to(problem.torch_dtype)
    return mask.expand(problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k)


def _empty_rows(mask: Tensor) -> Tensor:
    """Return [..., rows, 1], True where a mask hides every key."""
    if mask.dtype == torch.bool:
        hidden = ~mask
    else:
        hidden = mask == -math.inf
    return hidden.all(dim=-1, keepdim=True) if mask.dim() else hidden
