"""Describe the kernel of an additive mask's gradient for Hopper: what kernels/kernel.py asks."""

from __future__ import annotations

from flashcore.kernels.bwd_mask_sm90.plan import DMASK_KERNEL, MaskPlan
from flashcore.kernels.bwd_sm90.kernel import make_kernel
from flashcore.kernels.stage import Stage

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
    | dict.fromkeys(("fetch", "fetch_packet", "await", "fragment"), "dmask"),
    (STAGE,),
)
