"""Describe the kernel of an additive mask's gradient for Hopper: what kernels/kernel.py asks."""

from __future__ import annotations

from flashcore.kernels.bwd_mask_sm90.plan import DMASK_KERNEL, MaskPlan
from flashcore.kernels.bwd_sm90.kernel import make_kernel

DMASK = make_kernel(DMASK_KERNEL, "the kernel of a mask's gradient", MaskPlan)
