"""attention as torch sees it: the autograd.Function around every backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from flashcore.dispatch import run_backend, without_autocast
from flashcore.problem import Problem
from flashcore.tiled import attention_backward_tiled


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record a call with these tensors."""
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
    @once_differentiable
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v and of an additive mask that requires one."""
        q, k, v, mask, out, lse = ctx.saved_tensors
        _, _, needs_q, needs_k, needs_v, needs_mask = ctx.needs_input_grad
        with without_autocast(ctx.problem.device):
            dq, dk, dv, dmask = attention_backward_tiled(
                ctx.problem, q, k, v, mask, out, lse, dout, dlse, needs_mask
            )
        return (
            None,
            None,
            dq if needs_q else None,
            dk if needs_k else None,
            dv if needs_v else None,
            dmask,
        )
