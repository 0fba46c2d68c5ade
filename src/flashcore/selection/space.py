"""Say which tile configurations of a kernel there are to try. Pure functions, no GPU needed.

A configuration is the fields of a Plan that the problem does not decide. Those listed fit into
shared memory and ask for no more registers than a block can be given; only the compiler
knows which spill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.kernel import Tile
from flashcore.kernels.registry import kernel_of
from flashcore.selection.registers import spare_registers

# Fields that the problem, the GPU or a debug session decides; all others are the tile.
_GIVEN = frozenset(
    {
        "kernel",
        "arch",
        "cache_dtype",
        "dtype",
        "head_dim",
        "head_dim_v",
        "load_bytes",
        "has_window_left",
        "has_window_right",
        "has_sinks",
        "has_softcap",
        "softcap_is_large",
        "mask",
        "mask_load_bytes",
        "mask_is_row",
        "mask_is_shifted",
        "varlen",
        "page_size",
        "folds_heads",
        "keys_of_chunk",
        "fewest_splits",
        "whole_rows",
        "loaders",
        "stream_k",
        "load_stages",
        "strips",
        "batch_invariant",
        "gate",
        "returns_max_score",
        "also_dq",
        "ordered",
        "heads",
    }
)

# Registers of a thread beside the accumulators: addresses, row statistics, loop counters. The least
# that any configuration was seen to take, so that nothing that would not spill is left out.
_OTHER_REGISTERS = 24


def tile_of(plan: Plan) -> Tile:
    """Return the fields of a plan that the problem does not decide, by name."""
    names = (field.name for field in dataclasses.fields(plan))
    return {name: getattr(plan, name) for name in names if name not in _GIVEN}


def with_tile(plan: Plan, tile: Mapping[str, Any]) -> Plan | None:
    """Return the plan with another tile; None where the tile is not one of this kernel, or not
    legal."""
    own = tile_of(plan)
    if set(tile) != set(own) or any(type(tile[name]) is not type(own[name]) for name in own):
        return None
    changed = dataclasses.replace(plan, **tile)
    return changed if is_legal(changed) else None


def is_legal(plan: Plan) -> bool:
    """Return whether a plan fits the GPU, see Kernel.is_legal."""
    return kernel_of(plan).is_legal(plan)


def may_avoid_spills(plan: Plan) -> bool:
    """Return whether scores, output and what else a thread must hold could fit into its
    registers."""
    if kernel_of(plan).is_backward:  # of whose accumulators the compiler alone knows
        return True
    return spare_registers(plan) >= _OTHER_REGISTERS


def tiles(base: Plan) -> list[Plan]:
    """Return all sizes of tiles, with `base`'s other choices; `base` first."""
    kernel = kernel_of(base)
    found: dict[Plan, None] = {base: None}
    for plan in kernel.tiles(base):
        if kernel.is_legal(plan) and may_avoid_spills(plan):
            found[plan] = None
    return list(found)


def schedules(base: Plan) -> list[Plan]:
    """Return what there is to choose once the tile's sizes are known, one or several choices unlike
    `base`'s."""
    kernel = kernel_of(base)
    found = dict.fromkeys(kernel.schedules(base))
    return [plan for plan in found if plan != base and kernel.is_legal(plan)]
