"""Apply the error rule to gradients (flashcore.checks.gradient_accuracy)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashcore.backends.tiled import attention_tiled
from flashcore.checks.gradient_accuracy import gradient_reports
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
