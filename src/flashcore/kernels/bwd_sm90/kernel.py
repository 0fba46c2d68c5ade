"""Describe the backward kernels for Hopper: what kernels/kernel.py asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flashcore.kernels.bwd_sm90 import plan_one, stages
from flashcore.kernels.bwd_sm90.plan import ARCH, DKDV_KERNEL, DQ_KERNEL, BwdSm90Plan
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.kernels.fwd_sm90.tiles import ROWS_OF_CONSUMER
from flashcore.kernels.kernel import Kernel
from flashcore.kernels.limits import smem_limits
from flashcore.kernels.stage import Stage
from flashcore.problem import Problem

_TILE_FIELDS = (*BwdTile._fields, "also_dq", "ds_stages")


class BwdSm90Kernel(Kernel[BwdSm90Plan]):
    """A BwdSm90Kernel is one of those that compute delta, dq, dk and dv. See `Kernel`."""

    is_backward: ClassVar[bool] = True

    def num_pieces(self, problem: Problem, plan: BwdSm90Plan) -> int:
        """Return the number of tiles of rows, of keys or of a mask."""
        return plan.num_pieces(problem)

    def with_tile(self, plan: BwdSm90Plan, tile: Mapping[str, Any]) -> BwdSm90Plan:
        """Return the plan with fields of its tile changed.

        Raises:
            ValueError: a tile has no such field, a value is of another type, or the tile does not
                fit a block.
        """
        for name, value in tile.items():
            if name not in _TILE_FIELDS or type(getattr(plan, name)) is not type(value):
                raise ValueError(
                    f"tile={dict(tile)!r}: {name}={value!r} is no field of a tile of "
                    f"{plan.kernel}, which has {', '.join(_TILE_FIELDS)}"
                )
        changed = dataclasses.replace(plan, **tile)
        own, walked = changed.block_m, changed.block_n
        if changed.owns_keys:
            own, walked = walked, own
        stages = changed.num_stages, changed.other_stages, changed.ds_stages
        is_sized = own > 0 and own % ROWS_OF_CONSUMER == 0 and walked > 0 and walked % 16 == 0
        has_room = changed.smem_bytes <= smem_limits(ARCH)[0] and changed.num_threads <= 512
        if not is_sized or min(stages) < 1 or not has_room:
            raise ValueError(
                f"tile={dict(tile)!r} is not one that {plan.kernel} can have with head_dim "
                f"{plan.head_dim} and {plan.head_dim_v}: too much shared memory, too many warps, "
                "or sizes that are no multiples of 64 and 16"
            )
        return changed


def make_kernel(
    name: str,
    title: str,
    plan_class: type[BwdSm90Plan] = BwdSm90Plan,
    phases: Mapping[str, str] = stages.PHASES,
    of_stages: tuple[Stage, ...] = stages.STAGES,
) -> BwdSm90Kernel:
    """Return the object of one of the kernels."""
    common: dict[str, Any] = {
        "backend": "sm90",
        "only_arch": ARCH,
        "stages": of_stages,
        "outside": stages.OUTSIDE,
    }
    return BwdSm90Kernel(name=name, title=title, plan=plan_class, phases=phases, **common)


DQ = make_kernel(DQ_KERNEL, "the backward kernel of dq", phases=stages.PHASES_DQ)
DKDV = make_kernel(DKDV_KERNEL, "the backward kernel of dk and dv")
DELTA = make_kernel(plan_one.DELTA_KERNEL, "the kernel of delta", plan_one.RowsPlan)
ROUND = make_kernel(plan_one.ROUND_KERNEL, "the kernel that rounds dq", plan_one.RowsPlan)
