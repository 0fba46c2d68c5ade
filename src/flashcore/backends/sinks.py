"""Let sinks join what was computed without them, and compute their gradient.

A sink is a logit of a head that joins the softmax of each of the head's rows and has no value:
lse_i = log(sum_j exp(s_ij) + exp(sink)), and the weights are exp(s_ij - lse_i). It is a natural
logarithm, as scores are behind scale, softcap and mask, none of which changes it.

Given an lse that counts the sink, the gradients of q, k, v and the mask are what they are without
one, for exp(s_ij - lse_i) are the weights. The sink's gradient follows from delta, which they
need, too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Inputs, Results


def as_logits(sinks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return sinks as they are computed with: contiguous, in the dtype of lse."""
    return sinks.detach().to(dtype).contiguous()


def lse_of_no_keys(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Return lse, [..., num_heads_q, rows], filled for rows that see no key."""
    if sinks is None:
        return lse.fill_(-math.inf)
    return lse.copy_(sinks.unsqueeze(-1).expand_as(lse))


def joined_by_sinks(out: Tensor, lse: Tensor | None, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse as they are with sinks.

    Args:
        out: [batch, num_heads_q, seqlen_q, head_dim_v], computed without sinks.
        lse: [batch, num_heads_q, seqlen_q], of the same call.
        sinks: [num_heads_q], in the dtype of lse.
    """
    assert lse is not None
    joined = torch.logaddexp(lse, sinks.unsqueeze(-1).expand_as(lse))
    # An empty row has out 0; with a sink of -inf the difference would be NaN.
    factor = torch.exp(lse - joined).masked_fill(lse == -math.inf, 0.0)
    return out * factor.unsqueeze(-1), joined


def gradient_of_sinks(
    sinks: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None
) -> Tensor:
    """Compute the gradient of sinks; the same bits on every run.

    With delta = sum(dout * out) - dlse of each row, it is the sum of -exp(sink - lse) * delta over
    a head's rows: the sink's weight is exp(sink - lse), and its value is 0.

    Args:
        sinks: [num_heads_q].
        out: the forward's output, [batch, num_heads_q, seqlen_q, head_dim_v].
        lse: the forward's lse, which counts the sinks, [batch, num_heads_q, seqlen_q].
        dout: gradient of out, or None for zero.
        dlse: gradient of lse, or None for zero.

    Returns:
        [num_heads_q], dtype of sinks; 0 for a sink of -inf.
    """
    delta = torch.zeros_like(lse)
    if dout is not None:
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    logits = sinks.to(lse.dtype).unsqueeze(-1).expand_as(lse)
    terms = torch.exp(logits - lse) * delta
    return -terms.masked_fill(logits == -math.inf, 0.0).sum(dim=(0, 2)).to(sinks.dtype)


def packed_gradient_of_sinks(inputs: Inputs, results: Results, arriving: Results) -> Tensor | None:
    """Return the gradient of sinks, of results and gradients as `attention_varlen` has them."""
    if inputs.sinks is None:
        return None
    dout = None if arriving.out is None else as_batch(arriving.out)
    dlse = None if arriving.lse is None else arriving.lse[None]
    return gradient_of_sinks(inputs.sinks, as_batch(results.out), results.lse[None], dout, dlse)
