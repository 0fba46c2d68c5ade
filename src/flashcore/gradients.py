"""The gradient of attention: which code computes it.

On a Hopper GPU fused kernels do (backward_sm90.py). Elsewhere, and for what they do not know,
torch's fused backward operators do where they mean the same (torch_backward.py), and PyTorch
operations tile by tile where those do not (tiled.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flashcore import torch_backward
from flashcore.backward_sm90 import fused_backward, run_on_gpu
from flashcore.plan_bwd_sm90 import obstacle as obstacle_to_sm90
from flashcore.problem import Problem
from flashcore.tiled import attention_backward_tiled


@dataclass(frozen=True, slots=True)
class BackwardChoice:
    """The code that computes a gradient.

    Args:
        code: "sm90", "flash", "efficient" or "tiled".
        reason: why, in words.
    """

    code: str
    reason: str


def choose_backward(
    problem: Problem,
    *,
    through_lse: bool = False,
    mask_grad_elements: int = 0,
) -> BackwardChoice:
    """Resolve which code computes the gradient of a call.

    Args:
        problem: the description of the call. Of sequences that differ in length it is `packed`, or
            one of the sequences.
        through_lse: whether a gradient arrives through lse, or none through out.
        mask_grad_elements: how many elements an additive mask has that needs a gradient; 0 if none
            does.
    """
    reason = obstacle_to_sm90(problem, mask_grad_elements > 0)
    if reason is None:
        return BackwardChoice("sm90", "fused kernels for Hopper, deterministic")
    obstacle = torch_backward.obstacle_to_fused(problem, through_lse)
    if obstacle is not None:
        return BackwardChoice("tiled", obstacle)
    not_flash = torch_backward.obstacle_to_flash(problem)
    if not_flash is None:
        return BackwardChoice("flash", "torch's FlashAttention-2 computes the same gradient")
    not_efficient = torch_backward.obstacle_to_efficient(problem, mask_grad_elements)
    if not_efficient is None:
        return BackwardChoice("efficient", not_flash)
    return BackwardChoice("tiled", f"{not_flash}; {not_efficient}")


def attention_gradients(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs_mask_grad: bool,
) -> torch_backward.Gradients:
    """Compute dq, dk, dv and dmask; the arguments and results of `attention_backward_tiled`."""
    choice = choose_backward(
        problem,
        through_lse=dout is None or dlse is not None,
        mask_grad_elements=mask.numel() if mask is not None and needs_mask_grad else 0,
    )
    if choice.code == "tiled" or problem.is_empty:
        return attention_backward_tiled(
            problem, q, k, v, mask, out, lse, dout, dlse, needs_mask_grad
        )
    if choice.code == "sm90":
        inputs = problem, q, k, v, mask, out, lse, dout, dlse
        return *fused_backward(*inputs, run_on_gpu), None
    assert dout is not None
    whole_q, whole_k, whole_v, out, dout = (
        torch_backward.with_whole_packets(x) for x in (q, k, v, out, dout)
    )
    if choice.code == "flash":
        gradients = torch_backward.flash_gradients(
            problem, whole_q, whole_k, whole_v, out, lse, dout
        )
    else:
        gradients = torch_backward.efficient_gradients(
            problem, whole_q, whole_k, whole_v, mask, out, lse, dout, needs_mask_grad
        )
    dq, dk, dv, dmask = gradients
    like = torch_backward.laid_out_as
    return like(q, dq), like(k, dk), like(v, dv), dmask
