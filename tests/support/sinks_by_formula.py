"""Provide attention with sinks by its formula, for tests: the sink is one more key, whose value is
0."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from roads import LENGTHS, SEQLENS_K, dense_inputs, packed_inputs, padded, varlen

import flashcore

Tensor = torch.Tensor

SINKS = torch.tensor([0.5, -1.0, 2.5, 7.0], dtype=torch.float64)
ROADS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dense": (flashcore.attention, dense_inputs),
    "padded": (padded, dense_inputs),
    "packed": (varlen, packed_inputs),
}


def by_formula(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return out and lse, with the sink as one more key whose value is 0. Autograd sees it."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    score = (q @ k.mT) * (options.get("scale") or q.shape[-1] ** -0.5)
    if options.get("softcap"):
        score = options["softcap"] * torch.tanh(score / options["softcap"])
    ahead = torch.arange(k.shape[2]) - torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    left, right = options.get("window") or (-1, -1)
    right = 0 if options.get("causal") else right
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    hidden |= (ahead < -left) & (left >= 0)
    hidden |= (ahead > right) & (right >= 0)
    score = score.masked_fill(hidden, -math.inf)
    if visible is not None:
        score = score.masked_fill(~visible, -math.inf)
    score = torch.cat([score, sinks[:, None, None].expand(*score.shape[:3], 1)], dim=-1)
    return score.softmax(-1)[..., :-1] @ v, score.logsumexp(-1)


def expected(
    name: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return what a road computes, by the formula, sequence by sequence."""
    if name == "dense":
        return by_formula(q, k, v, sinks, **options)
    if name == "padded":
        parts = [
            by_formula(q[b, None], k[b, None, :, :n], v[b, None, :, :n], sinks, **options)
            for b, n in enumerate(SEQLENS_K)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    outs, lses, begin_q, begin_k = [], [], 0, 0
    behind = (q.shape[0] - sum(n for n, _ in LENGTHS), 0)  # rows of no sequence
    for num_q, num_k in (*LENGTHS, behind):
        own = (
            x[begin : begin + num].transpose(0, 1)[None]
            for x, begin, num in ((q, begin_q, num_q), (k, begin_k, num_k), (v, begin_k, num_k))
        )
        out, lse = by_formula(*own, sinks, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
        begin_q, begin_k = begin_q + num_q, begin_k + num_k
    return torch.cat(outs), torch.cat(lses, dim=1)
