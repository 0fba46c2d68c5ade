"""Compute the derivative of attention's backward pass, by plain operations of torch, which autograd
can differentiate again.

Rare, hence simple: all scores at once, so this alone takes memory quadratic in seqlen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.plain.attention import (
    Hidden,
    Rows,
    arriving,
    band,
    of_sinks,
    scale_of,
    weights,
    with_sink,
    without_sink,
)
from flashcore.problem.options import Options


def backward_of_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cotangents: tuple[Tensor | None, ...],
    options: Options,
    hidden: Hidden | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the vector-Jacobian product of attention's backward pass. Sizes may be symbolic.

    With t = scale * q.k, s = softcap(t), p = softmax(s + mask), dp = dout.v and
    g = p * (dp - sum(p * dp) + dlse), the backward pass is dmask = g, dt = g * s',
    dq = scale * dt k, dk = scale * dt^T q and dv = p^T dout. The cotangents of dq, dk, dv and
    dmask, x, y, z and w, meet it in the sum of g * r + p * dout.z with r = s' * u + w and
    u = scale * (x.k + q.y); what follows is the derivative of that sum, from its end to its start.
    A sink is one more key, with dp = u = 0; r there is the cotangent of its gradient, its own g.

    Args:
        dout: [batch, num_heads_q, seqlen_q, head_dim_v], or None for zero.
        dlse: [batch, num_heads_q, seqlen_q], or None for zero.
        q: as in `attention`, like k, v and mask.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        cotangents: of dq, dk, dv, dmask, dsinks; None is zero.
        options: of the call.
        hidden: what positions hide; None: what the options say.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.

    Returns:
        Gradients of dout, dlse, q, k, v, an additive mask and sinks.
    """
    rows, scale = Rows.of(q, k), scale_of(options, q)
    hidden = band(options, q, k) if hidden is None else hidden
    p, _, empty, slope, bend = weights(q, k, mask, options, hidden(slice(None)), rows, sinks)
    dout_, dlse_ = arriving(dout, dlse, q, v, empty, rows)
    x, y, z, w, of_dsinks = cotangents
    q_, k_, v_ = rows.stacked(q), k.to(rows.dtype), v.to(rows.dtype)
    x = torch.zeros_like(q_) if x is None else rows.stacked(x)
    y = torch.zeros_like(k_) if y is None else y.to(rows.dtype)
    z = torch.zeros_like(v_) if z is None else z.to(rows.dtype)

    dp = with_sink(dout_ @ v_.mT, sinks)
    inner = dp - (p * dp).sum(-1, keepdim=True) + dlse_
    g = p * inner
    u = (x @ k_.mT + q_ @ y.mT) * scale
    u = with_sink(u, sinks)
    r = u if slope is None else slope * u
    if w is not None:
        of_scores = rows.stacked(w.to(rows.dtype).expand(*q.shape[:3], k.shape[2]))
        r = r + with_sink(of_scores, sinks)
    if of_dsinks is not None:
        of_rows = of_dsinks.to(rows.dtype)[:, None, None].expand(*q.shape[:3], 1)
        r = torch.cat([r[..., :-1], r[..., -1:] + rows.stacked(of_rows)], dim=-1)
    r_sum = (p * r).sum(-1, keepdim=True)
    from_dp = p * (r - r_sum)
    from_p = inner * r - dp * r_sum + with_sink(dout_ @ z.mT, sinks)
    from_score = p * (from_p - (p * from_p).sum(-1, keepdim=True))
    from_t, from_u = from_score, g
    if slope is not None and bend is not None:
        from_t, from_u = from_score * slope + g * u * bend, g * slope
    from_t, from_u = (without_sink(x_, sinks) * scale for x_ in (from_t, from_u))
    from_sinks = of_sinks(from_score, sinks, rows)
    p, from_dp, from_score = (without_sink(x_, sinks) for x_ in (p, from_dp, from_score))
    from_mask = None
    if mask is not None and mask.dtype != torch.bool:
        from_mask = rows.by_head(from_score).sum_to_size(mask.shape).to(mask.dtype)
    return (
        rows.by_head(from_dp @ v_ + p @ z).to(q.dtype),
        rows.by_head(r_sum).squeeze(-1),
        rows.by_head(from_t @ k_ + from_u @ y).to(q.dtype),
        (from_t.mT @ q_ + from_u.mT @ x).to(k.dtype),
        (from_dp.mT @ dout_).to(v.dtype),
        from_mask,
        from_sinks,
    )
