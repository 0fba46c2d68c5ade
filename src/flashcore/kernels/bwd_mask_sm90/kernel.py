"""Describe the kernel of an additive mask's gradient for Hopper: what kernels/kernel.py asks."""

from __future__ import annotations

import dataclasses

from flashcore.kernels.bwd_mask_sm90.plan import DMASK_KERNEL, MaskPlan, select_mask_plan
from flashcore.kernels.bwd_sm90.kernel import BwdSm90Kernel, make_kernel
from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
from flashcore.kernels.stage import Stage
from flashcore.problem import Problem


class DmaskKernel(BwdSm90Kernel):
    """A DmaskKernel is that of the gradient of a mask. See `Kernel`."""

    def registers_between_tiles(self, plan: BwdSm90Plan) -> int | None:
        """Return None: some tiles spill a little with any number of registers."""
        return None

    def chosen(self, problem: Problem, gate: str | None = None) -> BwdSm90Plan:
        """Return the plan for a mask that is expanded wherever its stride is 0."""
        assert problem.mask is not None
        sizes = problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k
        batch, heads, rows, keys = (
            size if stride else 1 for size, stride in zip(sizes, problem.mask.strides, strict=True)
        )
        plan = select_mask_plan(problem, (batch, heads, rows, keys))
        return dataclasses.replace(plan, gate=gate)

    def barrier_places(self, plan: BwdSm90Plan) -> list[tuple[str, int]]:
        """Return the stages' barriers, see `Kernel`."""
        members = {"full": plan.num_stages, "empty": plan.num_stages}
        return [(name, index) for name, count in members.items() for index in range(count)]


STAGE = Stage(
    "dmask",
    None,
    "dMask = sum(dS)",
    "the gradient of an additive mask",
    "add_step in attn_bwd_dmask_sm90.cuh: operands and their stages, the mask's tile, lse and "
    "delta of the right rows; Walk and Piece in bwd_dmask_sm90.cuh: which scores are added to "
    "which tile; how a sum leaves",
)

DMASK = make_kernel(
    DMASK_KERNEL,
    "the kernel of a mask's gradient",
    MaskPlan,
    dict.fromkeys(("attn_bwd_dmask_sm90", "init_barriers"), "setup")
    | dict.fromkeys(("fetch", "fetch_packet", "fetch_rows", "await", "fragment"), "dmask"),
    (STAGE,),
    DmaskKernel,
)
