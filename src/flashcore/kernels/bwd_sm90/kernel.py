"""Describe the backward kernels for Hopper: what kernels/kernel.py asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import product
from typing import Any, ClassVar

from flashcore.kernels.bwd_sm90 import plan_one, stages
from flashcore.kernels.bwd_sm90.plan import (
    ARCH,
    DKDV_KERNEL,
    DQ_KERNEL,
    BwdSm90Plan,
    select_plans,
)
from flashcore.kernels.bwd_sm90.tiles import SHORTLIST_DKDV, SHORTLIST_DQ, BwdTile
from flashcore.kernels.fwd_sm90.tiles import ROWS_OF_CONSUMER
from flashcore.kernels.kernel import Kernel
from flashcore.kernels.limits import smem_limits
from flashcore.kernels.stage import Stage
from flashcore.problem import Problem

_TILE_FIELDS = (*BwdTile._fields, "also_dq", "ds_stages", "ordered")


class BwdSm90Kernel(Kernel[BwdSm90Plan]):
    """A BwdSm90Kernel is one of those that compute delta, dq, dk and dv. See `Kernel`."""

    is_backward: ClassVar[bool] = True

    def registers_between_tiles(self, plan: BwdSm90Plan) -> int | None:
        """Return what makes up for another tile, see `Kernel`."""
        return 32 if plan.role_registers else None

    def chosen(self, problem: Problem, gate: str | None = None) -> BwdSm90Plan:
        """Return the plan of this kernel that is selected for a problem, with a debug gate."""
        plans: list[BwdSm90Plan] = list(select_plans(problem))
        if plan_one.obstacle(problem) is None:
            plans += plan_one.select_one_kernel_plans(problem)
        plan = next(plan for plan in plans if plan.kernel == self.name)
        return dataclasses.replace(plan, gate=gate)

    def barrier_places(self, plan: BwdSm90Plan) -> list[tuple[str, int]]:
        """Return for each mbarrier the member of `Barriers` (bwd_dq_sm90.cuh, bwd_dkdv_sm90.cuh)
        that it belongs to, and its index there; a test compares the two."""
        if not plan.is_persistent:
            return [("full", 0)]
        if plan.is_dq:
            slots = plan.dq_buffers[0] * plan.num_consumers
            members = {"q_full": slots, "q_empty": slots}
            members |= dict.fromkeys(("k_full", "k_empty"), plan.num_stages)
            members |= dict.fromkeys(("v_full", "v_empty"), plan.other_stages)
        else:
            members = {"coord_full": 2, "kv_full": 1, "kv_empty": 1, "v_full": 1, "v_empty": 1}
            members |= {"probs_full": 1, "probs_empty": 1}
            members |= dict.fromkeys(("q_full", "q_empty", "tile_full"), plan.num_stages)
            members |= dict.fromkeys(("do_full", "do_empty"), plan.other_stages)
            members |= dict.fromkeys(("ds_full", "ds_empty"), plan.ds_stages * plan.also_dq)
            members["sums_full"] = plan.num_sums_full
            members["sums_empty"] = 2 * plan.also_dq
        return [(name, index) for name, count in members.items() for index in range(count)]

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
        if not self.is_legal(changed):
            raise ValueError(
                f"tile={dict(tile)!r} is not one that {plan.kernel} can have with head_dim "
                f"{plan.head_dim} and {plan.head_dim_v}: too much shared memory, too many warps, "
                "sizes that are no multiples of 64 and 16, or, where consumers share dq, other "
                "than 64 rows, one buffer of dS, or products in another order"
            )
        return changed

    def is_legal(self, plan: BwdSm90Plan) -> bool:
        """Return whether a plan fits a block: shared memory, threads, and sizes that its warpgroups
        can share."""
        own, walked = plan.block_m, plan.block_n
        if plan.owns_keys:
            own, walked = walked, own
        if min(own, walked, plan.num_stages, plan.other_stages, plan.ds_stages) < 1:
            return False
        if own % ROWS_OF_CONSUMER or walked % 16 or plan.num_threads > 512:
            return False
        if plan.has_roles and own > ROWS_OF_CONSUMER:
            return False
        if plan.also_dq and (walked % ROWS_OF_CONSUMER or plan.has_roles):
            return False
        if plan.also_dq and not plan.has_dq_role:  # the consumers share dq, a tile later
            is_in_order = plan.overlaps and not plan.early_dp
            if walked != ROWS_OF_CONSUMER or plan.ds_stages < 2 or not is_in_order:
                return False
        return plan.smem_bytes <= smem_limits(ARCH)[0]

    def tiles(self, base: BwdSm90Plan) -> list[BwdSm90Plan]:
        """Return all sizes, each with as many stages as `base` or fewer, see `Kernel`."""
        own, walked = (64, 128, 192), (16, 32, 48, 64, 80, 96, 128)
        sizes = [(y, x) if base.owns_keys else (x, y) for x in own for y in walked]
        plans = []
        for block_m, block_n in sizes:
            for num_stages in range(base.num_stages, 0, -1):
                plan = dataclasses.replace(
                    base, block_m=block_m, block_n=block_n, num_stages=num_stages,
                    other_stages=min(base.other_stages, num_stages),
                )  # fmt: skip
                if self.is_legal(plan):
                    plans.append(plan)
                    break
        return plans

    def schedules(self, base: BwdSm90Plan) -> list[BwdSm90Plan]:
        """Return all stages, and orders of the products, see `Kernel`."""
        orders: list[dict[str, Any]] = [{"overlaps": overlaps} for overlaps in (True, False)]
        if base.owns_keys:
            flags = ("overlaps", "early_dp", "keeps_p")
            orders = [dict(zip(flags, x, strict=True)) for x in product((True, False), repeat=3)]
        return [
            dataclasses.replace(base, num_stages=stages, other_stages=others, **order)
            for stages in (1, 2, 3, 4)
            for others in range(1, min(stages, 3) + 1)
            for order in orders
        ]

    def shortlist(self, base: BwdSm90Plan) -> list[dict[str, Any]]:
        """Return the tiles that were the best of some shape, or near it."""
        tiles = SHORTLIST_DQ if base.is_dq else SHORTLIST_DKDV
        listed = [tile._asdict() for tile in tiles]
        if base.also_dq:
            listed = [tile | {"ds_stages": n} for tile in listed for n in (1, 2)]
        return listed

    def variant_of(self, plan: BwdSm90Plan) -> str:
        """Return that it computes dq too, see `Kernel`."""
        return "also_dq" if plan.also_dq else ""


def make_kernel(
    name: str,
    title: str,
    plan_class: type[BwdSm90Plan] = BwdSm90Plan,
    phases: Mapping[str, str] = stages.PHASES,
    of_stages: tuple[Stage, ...] = stages.STAGES,
    kernel_class: type[BwdSm90Kernel] = BwdSm90Kernel,
) -> BwdSm90Kernel:
    """Return the object of one of the kernels."""
    common: dict[str, Any] = {
        "backend": "sm90",
        "only_arch": ARCH,
        "stages": of_stages,
        "outside": stages.OUTSIDE,
    }
    return kernel_class(name=name, title=title, plan=plan_class, phases=phases, **common)


DQ = make_kernel(DQ_KERNEL, "the backward kernel of dq", phases=stages.PHASES_DQ)
DKDV = make_kernel(DKDV_KERNEL, "the backward kernel of dk and dv")
DELTA = make_kernel(plan_one.DELTA_KERNEL, "the kernel of delta", plan_one.RowsPlan)
ROUND = make_kernel(plan_one.ROUND_KERNEL, "the kernel that rounds dq", plan_one.RowsPlan)
