"""List the plans worth trying where time is short, instead of all that are legal."""

from __future__ import annotations

import dataclasses

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.limits import blocks_that_fit
from flashcore.kernels.registry import kernel_of
from flashcore.selection.space import may_avoid_spills, tiles


def shortlist(base: Plan) -> list[Plan]:
    """Return `base` first, then the plans worth trying with its problem; fields that the kernel's
    list does not name keep `base`'s values. Where it has none, all sizes of tiles are listed."""
    kernel = kernel_of(base)
    listed = kernel.shortlist(base)
    if listed is None:
        return tiles(base)
    plans: dict[Plan, None] = {base: None}
    for tile in listed:
        plan = kernel.fitted(dataclasses.replace(base, **tile))
        # An SM has room for as many blocks as it has registers for.
        has_room = plan.min_blocks <= blocks_that_fit(plan.smem_bytes, plan.arch)
        if kernel.is_legal(plan) and has_room and may_avoid_spills(plan):
            plans[plan] = None
    return list(plans)
