"""Apply the error rule (flashcore.checks.accuracy) for gradients: each against float64, beside
those of the same attention written plainly in the dtype.

A fused backward pass is given out, rounded to the dtype, and has delta = sum(dout * out) from it.
The plain one has sum(p * dp), of which it knows both sides: in a row that sees few keys, nearly all
weight on one, their errors cancel, and its gradients are many times as exact (measured: in 0.5 % of
inputs with 2 queries, 11 times). From some ten rows on others have the largest error. So the
yardstick counts as no better than what the rounded out costs an exact backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashcore.backends.tiled import attention_backward_tiled, attention_tiled
from flashcore.checks.accuracy import ABSOLUTE_DEFAULT, FACTOR, _max_and_mean, _rounding
from flashcore.checks.reference import visible_pairs
from flashcore.problem import Problem


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]):
    """Return the Problem of a call, its out and its lse."""
    problem = Problem.from_tensors(q, k, v, mask=mask, return_lse=True, **options)
    return problem, *attention_tiled(problem, q, k, v, mask)


def exact_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dout: Tensor, dlse: Tensor | None,
    options: dict[str, Any], given_out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return dq, dk, dv in float64; tests/backends/test_gradients.py checks what computes them.
    Delta comes from `given_out`, or from the exact out rounded to `out_dtype`."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    problem, out, lse = forward(q, k, v, mask, options)
    out = (out.to(out_dtype) if given_out is None else given_out).double()
    dlse = None if dlse is None else dlse.double()
    return attention_backward_tiled(problem, q, k, v, mask, out, lse, dout, dlse, False)[:3]


def plain_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dout: Tensor, dlse: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the gradients by autograd, everything in the dtype of q, lse in float32."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = options.get("scale") or 1.0 / math.sqrt(q.shape[-1])
    score = (q * math.sqrt(scale)) @ (k.transpose(-1, -2) * math.sqrt(scale))
    if options.get("softcap"):
        score = options["softcap"] * torch.tanh(score / options["softcap"])
    visible = visible_pairs(
        q.shape[2], k.shape[2], options.get("causal", False), options.get("window"), q.device
    )
    score = score.masked_fill(~visible, -math.inf)
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else score + mask
    empty = torch.all(score == -math.inf, dim=-1, keepdim=True)
    score = score.masked_fill(empty, 0.0)
    weight = torch.softmax(score, dim=-1).masked_fill(empty, 0.0)
    results = [weight.to(q.dtype) @ v]
    cotangents = [dout.masked_fill(empty, 0.0)]
    if dlse is not None:
        results.append(score.float().logsumexp(-1))
        cotangents.append(dlse.masked_fill(empty[..., 0], 0.0))
    return torch.autograd.grad(results, leaves, cotangents)


def wrong_gradients(
    gradients: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    dout: Tensor, dlse: Tensor | None, options: dict[str, Any], out: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Return what breaks the rule: a line for each of dq, dk, dv that does. `out` is what the
    backward pass was given; by default the exact one, rounded to the dtype."""
    exact = exact_gradients(q, k, v, mask, dout, dlse, options)
    plain = plain_gradients(q, k, v, mask, dout, dlse, options)
    given = exact_gradients(q, k, v, mask, dout, dlse, options, out, out_dtype=q.dtype)
    wrong = []
    for name, x, yardstick, of_given, want in zip(
        ("dq", "dk", "dv"), gradients, plain, given, exact, strict=True
    ):
        errors, others = _max_and_mean(x, want), _max_and_mean(yardstick, want)
        floors = zip(_rounding(want, q.dtype), _max_and_mean(of_given, want), strict=True)
        for kind, error, other, least in zip(
            ("max", "mean"), errors, others, map(max, floors), strict=True
        ):
            # With one key dq and dk are exactly 0, plainly too; float32 leaves a little of dout.v.
            absolute = ABSOLUTE_DEFAULT * (4 if other == 0 else 1)
            limit = FACTOR * max(other, least) + absolute
            if not error <= limit:
                wrong.append(f"{name}: {kind} error {error:.3g}, limit {limit:.3g}")
    return wrong
