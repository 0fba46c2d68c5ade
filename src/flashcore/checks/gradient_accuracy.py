"""Apply the error rule of checks/accuracy.py to the gradients of q, k and v.

Right are autograd's gradients of the float64 oracle, and the yardstick autograd's gradients of the
same attention written plainly in the dtype. What arrives at a row that sees nothing changes no
gradient, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashcore.checks.accuracy import ErrorReport, compared, torch_math_results
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
        options: causal, scale, window, softcap and mask, as for `attention_oracle`.

    Returns:
        dq, dk and dv, float64, of the shapes of q, k and v.
    """
    wide = (x.double() for x in (q, k, v))
    return _differentiated(attention_oracle, tuple(wide), dout, dlse, options)


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
    return _differentiated(torch_math_results, (q, k, v), dout, dlse, options)


def gradient_reports(
    gradients: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None = None,
    *,
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
        where: which part of a call it is, for people.
        options: causal, scale, window, softcap and mask.
    """
    exact = gradient_oracle(q, k, v, dout, dlse, **options)
    plain = plain_gradients(q, k, v, dout, dlse, **options)
    factors = (_largest(k), _largest(q), 1.0)
    return [
        compared(have, want, yardstick, q.dtype, _SLACK_WHERE_EXACT * factor, name + where)
        for name, have, want, yardstick, factor in zip(
            NAMES, gradients, exact, plain, factors, strict=True
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
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, lse = function(*leaves, **options)
    empty = lse.detach() == -torch.inf
    dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype)
    cotangents = [dout.masked_fill(empty[..., None], 0.0), dlse.masked_fill(empty, 0.0)]
    return torch.autograd.grad([out, lse], leaves, cotangents)
