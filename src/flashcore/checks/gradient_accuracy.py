"""Apply the error rule of checks/accuracy.py to the gradients of q, k and v.

Right are autograd's gradients of the float64 oracle, and the yardstick autograd's gradients of the
same attention written plainly in the dtype. The gradient that arrives at a row that sees nothing
changes no other, whatever it is.

A fused backward pass is given out, rounded to the dtype, and has delta = sum(dout * out) from it.
The plain one has sum(p * dp), of which it knows both sides: in a row that sees few keys, nearly all
weight on one, their errors cancel, and its gradients are many times as exact (measured: in 0.5 % of
inputs with 2 queries, 11 times). From some ten rows on others have the largest error. So the
yardstick counts as no better than what the rounded out costs an exact backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashcore.checks.accuracy import ErrorReport, compared, max_and_mean, torch_math_results
from flashcore.checks.reference import attention_oracle

NAMES = ("dq", "dk", "dv")
# With one key dq and dk are exactly 0, plainly too; float32 leaves a little of dout.v, times k and
# q.
_SLACK_WHERE_EXACT = 4.0


def gradient_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Compute the gradients of attention in float64.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim], any floating dtype and device.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        dout: gradient of out, [batch, num_heads_q, seqlen_q, head_dim_v], or None for zero.
        dlse: gradient of lse, [batch, num_heads_q, seqlen_q], or None for zero.
        options: causal, scale, window, softcap, mask and sinks, as for `attention_oracle`.

    Returns:
        dq, dk and dv, float64, of the shapes of q, k and v.
    """
    wide = q.double(), k.double(), v.double()
    return _differentiated(attention_oracle, wide, dout, dlse, options)[0]


def plain_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Compute the gradients of unfused attention in the dtype of q; arguments and results as for
    `gradient_oracle`."""
    return _differentiated(torch_math_results, (q, k, v), dout, dlse, options)[0]


def gradient_reports(
    gradients: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None = None,
    *,
    out: Tensor | None = None,
    where: str = "",
    **options: Any,
) -> list[ErrorReport]:
    """Judge dq, dk and dv by the error rule.

    Args:
        gradients: dq, dk and dv.
        q: as passed to `attention`, as are all that follow; see `gradient_oracle`.
        k: the keys.
        v: the values.
        dout: the gradient that arrived at out, or None.
        dlse: the gradient that arrived at lse, or None.
        out: what the backward pass was given; by default the exact one, rounded to the dtype of q.
        where: which part of a call it is, for people.
        options: causal, scale, window, softcap, mask and sinks.
    """
    wide = q.double(), k.double(), v.double()
    rounded = (q.dtype, out)
    exact, of_given = _differentiated(attention_oracle, wide, dout, dlse, options, rounded)
    plain = plain_gradients(q, k, v, dout, dlse, **options)
    factors = (_largest(k), _largest(q), 1.0)
    return [
        compared(
            have,
            want,
            yardstick,
            q.dtype,
            _SLACK_WHERE_EXACT * factor,
            max_and_mean(given, want),
            name + where,
        )
        for name, have, want, yardstick, given, factor in zip(
            NAMES, gradients, exact, plain, of_given, factors, strict=True
        )
    ]


def _largest(x: Tensor) -> float:
    """Return the largest absolute value, or 1 if that is more."""
    return max(1.0, float(x.detach().abs().max())) if x.numel() else 1.0


def worst(reports: Sequence[ErrorReport]) -> ErrorReport | None:
    """Return the first report that fails, or else the one that is nearest to its limit; None
    without any."""
    failed = next((report for report in reports if not report.ok), None)
    if failed is not None:
        return failed
    with_limit = [report for report in reports if report.max_limit > 0] or list(reports)[:1]
    return max(with_limit, key=lambda r: r.max_error / (r.max_limit or 1.0), default=None)


def _differentiated(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    dout: Tensor | None,
    dlse: Tensor | None,
    options: dict[str, Any],
    given: tuple[torch.dtype, Tensor | None] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the gradients of a function, and those that it has where delta comes from another out:
    the one that is given, or its own rounded to a dtype. Without `given` they are the same."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, lse = function(*leaves, **options)
    empty = lse.detach() == -torch.inf
    dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype)
    dout, dlse = dout.masked_fill(empty[..., None], 0.0), dlse.masked_fill(empty, 0.0)
    found = torch.autograd.grad([out, lse], leaves, [dout, dlse], retain_graph=True)
    if given is None:
        return found, found
    dtype, other = given
    other = out.detach().to(dtype) if other is None else other
    # ds = p (dp - delta + dlse): what is less in delta is more in dlse.
    less = (dout * (out.detach() - other.to(out.dtype))).sum(-1).masked_fill(empty, 0.0)
    return found, torch.autograd.grad([out, lse], leaves, [dout, dlse + less])
