"""attention as torch sees it: the autograd.Function around every backend."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.autograd import forward_ad

from flashcore.dispatch import run_backend, without_autocast
from flashcore.problem import Problem
from flashcore.tiled import Tiles, attention_backward_tiled


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must see a call with these tensors: to record it, or (inside forward_ad)
    to refuse it, for tangents would be lost silently."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class AttentionFunction(torch.autograd.Function):
    """Forward on any backend, backward by tile-wise recomputation in PyTorch.

    Saves q, k, v, the mask, out and lse, so memory is linear in seqlen (besides the user's mask).
    """

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        backend: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See `run_backend`; returns lse only if the problem asks for it."""
        recorded = dataclasses.replace(problem, return_lse=True)
        out, lse = run_backend(backend, recorded, q, k, v, mask)
        assert lse is not None
        ctx.problem = recorded
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.set_materialize_grads(False)
        return (out, lse) if problem.return_lse else out

    @staticmethod
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v and of an additive mask that requires one."""
        problem = ctx.problem
        q, k, v, mask, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        with without_autocast(problem.device):
            if (
                torch.is_grad_enabled()
            ):  # create_graph=True: the gradient itself gets differentiated
                return (
                    None,
                    None,
                    *_recorded_backward(problem, (q, k, v, mask), needs, dout, dlse),
                )
            gradients = attention_backward_tiled(
                problem, q, k, v, mask, out, lse, dout, dlse, needs[3]
            )
        return (
            None,
            None,
            *(g if need else None for g, need in zip(gradients, needs, strict=True)),
        )


def _recorded_backward(
    problem: Problem,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    needs: tuple[bool, ...],
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """The gradient by operations that autograd can differentiate again.

    Rare, hence simple: all scores at once, so this alone takes memory quadratic in seqlen.
    """
    if problem.is_empty:
        return [None if x is None else torch.zeros_like(x) for x in tensors]
    # Views, so that attention(x, x, x) has three inputs here too.
    q, k, v = (x.view_as(x) for x in tensors[:3])
    mask = None if tensors[3] is None else tensors[3].view_as(tensors[3])
    outputs = _plain_attention(problem, q, k, v, mask)
    pairs = [(y, dy) for y, dy in zip(outputs, (dout, dlse), strict=True) if dy is not None]
    wanted = [x for x, need in zip((q, k, v, mask), needs, strict=True) if need and x is not None]
    gradients = iter(
        torch.autograd.grad(
            [y for y, _ in pairs],
            wanted,
            [dy for _, dy in pairs],
            create_graph=True,
            materialize_grads=True,
        )
    )
    return [next(gradients) if need else None for need in needs]


def _plain_attention(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) with one tile that holds everything."""
    tiles = Tiles(problem, q, k, v, mask)
    rows, columns = slice(0, problem.seqlen_q), slice(0, problem.seqlen_k)
    score, _ = tiles.scores(tiles.rows(q, rows), tiles.keys(k, columns), rows, columns)
    empty = torch.all(score == -math.inf, dim=-1, keepdim=True)
    score = score.masked_fill(empty, 0.0)
    weight = torch.softmax(score, dim=-1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(score, dim=-1, keepdim=True).masked_fill(empty, -math.inf)
    out = tiles.to_heads(weight @ tiles.keys(v, columns)).to(q.dtype)
    return out, tiles.to_heads(lse).squeeze(-1)
