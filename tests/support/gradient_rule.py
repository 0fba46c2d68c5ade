"""Apply the error rule to gradients (flashcore.checks.gradient_accuracy)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashcore.backends.tiled import attention_tiled
from flashcore.checks.accuracy import compared, max_and_mean, torch_math_results
from flashcore.checks.gradient_accuracy import gradient_reports
from flashcore.checks.reference import attention_oracle
from flashcore.problem import Problem


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]):
    """Return the Problem of a call, its out and its lse."""
    problem = Problem.from_tensors(q, k, v, mask=mask, return_lse=True, **options)
    return problem, *attention_tiled(problem, q, k, v, mask)


def wrong_gradients(
    gradients: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    dout: Tensor, dlse: Tensor | None, options: dict[str, Any], out: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Return what breaks the rule: a line for each of dq, dk, dv that does. `out` is what the
    backward pass was given; by default the exact one, rounded to the dtype."""
    reports = gradient_reports(gradients, q, k, v, dout, dlse, out=out, mask=mask, **options)
    return [str(report) for report in reports if not report.ok]


def wrong_mask_gradient(
    found: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dout: Tensor,
    dlse: Tensor | None, options: dict[str, Any], out: Tensor,
) -> list[str]:  # fmt: skip
    """Return the line that says how dmask breaks the rule; nothing if it does not. A backward pass
    is given `out`, so the yardstick counts as no better than what its rounding costs."""

    def differentiated(function: Any, wide: bool, less: Tensor | None = None) -> Tensor:
        tensors = [x.detach().double() if wide else x.detach() for x in (q, k, v, mask)]
        leaf = tensors[3].requires_grad_()
        result, lse = function(*tensors[:3], mask=leaf, **options)
        empty = lse.detach() == -math.inf
        given = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype)
        given = (given if less is None else given + less).masked_fill(empty, 0.0)
        arriving = dout.to(result.dtype).masked_fill(empty[..., None], 0.0)
        (gradient,) = torch.autograd.grad([result, lse], [leaf], [arriving, given])
        return gradient

    exact = differentiated(attention_oracle, True)
    plain = differentiated(torch_math_results, False)
    wide = [x.detach().double() for x in (q, k, v)]
    right = attention_oracle(*wide, mask=mask.detach(), **options)[0]
    less = (dout.double() * (right - out.double())).sum(-1).nan_to_num()
    given = differentiated(attention_oracle, True, less)
    # Where the plain gradient is exactly 0, float32 leaves a little of dout.v (gradient_accuracy).
    slack = 4.0 * max(1.0, float(plain.abs().max()))
    report = compared(found, exact, plain, mask.dtype, slack, max_and_mean(given, exact), "dmask")
    return [] if report.ok else [str(report)]
