"""Tensors for aten's flash operators, and checks of what they return."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from gradient_rule import wrong_gradients
from torch import Tensor

from flashcore.checks.accuracy import error_report


def randn(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).half().to(device)


def dense(device: str = "cpu", rows: bool = False) -> list[Tensor]:
    """q, k, v and dout, grouped heads; [batch, num_heads, seqlen, head_dim] over memory of
    [batch, seqlen, num_heads, head_dim], or with `rows` that memory itself."""
    x = [
        randn(2, seqlen, heads, 16, seed=seed, device=device)
        for seed, (seqlen, heads) in enumerate(((20, 4), (35, 2), (35, 2), (20, 4)))
    ]
    return x if rows else [t.transpose(1, 2) for t in x]


def check(out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    report = error_report(out, q, k, v, lse=lse, **options)
    assert report.ok, str(report)


def packed(device: str = "cpu") -> tuple[list[Tensor], Tensor, list[int]]:
    ends = [0, 7, 7, 30, 41]
    x = [randn(41, heads, 16, seed=seed, device=device) for seed, heads in enumerate((4, 2, 2, 4))]
    return x, torch.tensor(ends, dtype=torch.int32, device=device), ends


def check_packed(
    out: Tensor, gradients: tuple[Tensor, ...], lse: Tensor, x: list[Tensor], ends: list[int],
    **options: Any,
) -> None:  # fmt: skip
    for begin, end in itertools.pairwise(ends):
        if begin == end:
            continue
        q, k, v, dout = (t[begin:end].transpose(0, 1)[None] for t in x)
        part = out[begin:end].transpose(0, 1)[None]
        check(part, lse[None, :, begin:end], q, k, v, **options)
        own = tuple(g[begin:end].transpose(0, 1)[None] for g in gradients)
        assert wrong_gradients(own, q, k, v, None, dout, None, options) == []


def by_varlen_attn(
    x: list[Tensor], cu: Tensor, window: tuple[int, int], backend: str | None = None
) -> tuple[Any, ...]:
    """torch.nn.attention.varlen_attn, unmodified: out, lse and gradients. Torch 2.11's knows no
    grouped heads."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        aux = AuxRequest(lse=True)
        return varlen_attn(q, k, v, cu, cu, 23, 23, window_size=window, return_aux=aux)

    leaves = [t.clone().requires_grad_() for t in x[:3]]
    if backend is not None:
        attend = torch.compile(attend, fullgraph=True, backend=backend)
    out, lse = attend(*leaves)
    return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, x[3])
