"""The derivative of attention's backward pass, by plain operations of torch, which autograd can
differentiate again.

Rare, hence simple: all scores at once, so this alone takes memory quadratic in seqlen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcore.options import Options


def backward_of_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cotangents: tuple[Tensor | None, ...],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The vector-Jacobian product of attention's backward pass. Sizes may be symbolic.

    With t = scale * q.k, s = softcap(t), p = softmax(s + mask), dp = dout.v and
    g = p * (dp - sum(p * dp) + dlse), the backward pass is dmask = g, dt = g * s',
    dq = scale * dt k, dk = scale * dt^T q and dv = p^T dout. The cotangents of dq, dk, dv and
    dmask, x, y, z and w, meet it in the sum of g * r + p * dout.z with r = s' * u + w and
    u = scale * (x.k + q.y); what follows is the derivative of that sum, from its end to its start.

    Args:
        dout: [batch, num_heads_q, seqlen_q, head_dim_v], or None for zero.
        dlse: [batch, num_heads_q, seqlen_q], or None for zero.
        q: as in `attention`, like k, v and mask.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: as in `attention`, or None.
        cotangents: of dq, dk, dv, dmask; None is zero.
        options: of the call.

    Returns:
        Gradients of dout, dlse, q, k, v and an additive mask.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, heads_q, seqlen_q, head_dim), (_, heads_kv, seqlen_k, head_dim_v) = q.shape, v.shape
    rows = heads_q // max(heads_kv, 1) * seqlen_q  # the heads that share a head of k and v, stacked
    scale = 1.0 / math.sqrt(head_dim) if options.scale is None else options.scale

    def stacked(x: Tensor | None, columns: int) -> Tensor:
        if x is None:
            return q.new_zeros((batch, heads_kv, rows, columns), dtype=dtype)
        return x.to(dtype).reshape(batch, heads_kv, rows, columns)

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(batch, heads_q, seqlen_q, x.shape[3])

    x, y, z, w = cotangents
    q_, k_, v_ = stacked(q, head_dim), k.to(dtype), v.to(dtype)
    x = stacked(x, head_dim)
    y = torch.zeros_like(k_) if y is None else y.to(dtype)
    z = torch.zeros_like(v_) if z is None else z.to(dtype)

    t = q_ @ k_.mT * scale
    s, ds, dds = t, torch.ones_like(t), torch.zeros_like(t)
    if options.softcap:
        tanh = torch.tanh(t / options.softcap)
        s, ds = tanh * options.softcap, 1.0 - tanh * tanh
        dds = -2.0 / options.softcap * tanh * ds
    score = by_head(s).masked_fill(_hidden(options, seqlen_q, seqlen_k, q.device), -math.inf)
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else score + mask
    empty = torch.all(score == -math.inf, dim=-1, keepdim=True)
    p = torch.softmax(score.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    p, empty = stacked(p, seqlen_k), empty.reshape(batch, heads_kv, rows, 1)
    # Whatever gradient arrives at an empty row stops there, as in the first order.
    dout_ = stacked(dout, head_dim_v).masked_fill(empty, 0.0)
    dlse_ = stacked(dlse, 1).masked_fill(empty, 0.0)

    dp = dout_ @ v_.mT
    inner = dp - (p * dp).sum(-1, keepdim=True) + dlse_
    g = p * inner
    u = (x @ k_.mT + q_ @ y.mT) * scale
    r = ds * u
    if w is not None:
        r = r + stacked(w.to(dtype).expand(batch, heads_q, seqlen_q, seqlen_k), seqlen_k)
    r_sum = (p * r).sum(-1, keepdim=True)
    from_dp = p * (r - r_sum)
    from_p = inner * r - dp * r_sum + dout_ @ z.mT
    from_score = p * (from_p - (p * from_p).sum(-1, keepdim=True))
    from_t = (from_score * ds + g * u * dds) * scale
    from_u = g * ds * scale
    from_mask = None
    if mask is not None and mask.dtype != torch.bool:
        from_mask = by_head(from_score).sum_to_size(mask.shape).to(mask.dtype)
    return (
        by_head(from_dp @ v_ + p @ z).to(q.dtype),
        by_head(r_sum).squeeze(-1),
        by_head(from_t @ k_ + from_u @ y).to(q.dtype),
        (from_t.mT @ q_ + from_u.mT @ x).to(k.dtype),
        (from_dp.mT @ dout_).to(v.dtype),
        from_mask,
    )


def _hidden(options: Options, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """[seqlen_q, seqlen_k], True where the position hides a key."""
    offset = 0 if options.causal == "upper_left" else seqlen_k - seqlen_q
    i = torch.arange(seqlen_q, device=device)[:, None] + offset
    j = torch.arange(seqlen_k, device=device)[None, :]
    left, right = options.window_left, options.window_right
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        hidden = hidden | (j < i - left)
    if options.causal != "none":
        return hidden | (j > i)
    return hidden | (j > i + right) if right >= 0 else hidden
