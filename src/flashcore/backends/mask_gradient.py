"""Compute the gradient of an additive mask beside the fused backward.

Its kernel adds up what the scores that share an element have (kernels/bwd_mask_sm90/plan.py). A
mask with one element a row moves no weight from key to key: its gradient needs no scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashcore.kernels.bwd_mask_sm90.plan import MaskPlan, select_mask_plan
from flashcore.problem import Problem


def shape_of(mask: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of a mask with all four dimensions."""
    *_, batch, heads, rows, keys = (1, 1, 1, 1, *mask.shape)
    return batch, heads, rows, keys


def gradient_of_rows(
    mask: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of a mask that is the same for all keys of a row.

    With delta = sum(dout * out) - dlse, the gradients of a row's scores, p (dout.v - delta), add up
    to sum(dout * out) - delta sum(p), where p adds up to 1 without the sink's part.

    Args:
        mask: additive, broadcast to the scores; its last dimension has size 1.
        out: the forward's output, [batch, num_heads_q, seqlen_q, head_dim_v].
        lse: the forward's lse, [batch, num_heads_q, seqlen_q].
        dout: gradient of out, or None for zero.
        dlse: gradient of lse, or None for zero.
        sinks: [num_heads_q], a logit of each head that joined the softmax; or None.

    Returns:
        Shape and dtype of mask; what an empty row would contribute is 0.
    """
    sums = torch.zeros_like(lse) if dlse is None else dlse
    if sinks is not None:
        of_sink = torch.exp(sinks.to(lse.dtype).unsqueeze(-1) - lse)
        of_out = 0.0 if dout is None else (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        sums = sums + of_sink * (of_out - sums)
    sums = sums.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
    return sums.sum_to_size(shape_of(mask)).reshape(mask.shape).to(mask.dtype)


def run_for_mask(
    problem: Problem,
    tensors: dict[str, Tensor],
    dmask: Tensor,
    run: Callable[[Problem, MaskPlan, dict[str, Tensor]], None],
    plan: MaskPlan | None = None,
) -> None:
    """Run the kernel of a mask's gradient.

    Args:
        problem: of the forward, as the kernel of dq has it.
        tensors: of the kernel of dq, by name, with the delta that it has written.
        dmask: contiguous, [batch or 1, num_heads_q or 1, seqlen_q or 1, seqlen_k], dtype of the
            mask; written.
        run: runs one kernel on named tensors.
        plan: by default what is selected for the problem.
    """
    batch, heads, rows, keys = dmask.shape
    plan = plan or select_mask_plan(problem, (batch, heads, rows, keys))
    read = {name: x for name, x in tensors.items() if name not in ("dq", "dk", "dv")}
    if plan.num_shares == 1:
        run(problem, plan, read | {"dmask": dmask})
        return
    shares = dmask.new_empty(plan.shares_shape(problem), dtype=torch.float32)
    run(problem, plan, read | {"dmask_shares": shares})
    dmask.copy_(shares.sum(0)[..., :keys])
