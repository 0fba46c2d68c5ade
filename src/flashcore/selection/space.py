"""Say which tile configurations of a kernel there are to try. Pure functions, no GPU needed.

A configuration is the fields of a Plan that the problem does not decide. What is listed fits into
shared memory and asks for no more registers than a block can be given; what spills only the
compiler knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flashcore.kernels.fwd_sm90.plan import O_PARTS, Q_BUFFERS, Sm90Plan, with_o_fitted
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.limits import blocks_that_fit, smem_limits
from flashcore.selection.registers import spare_registers

Tile = dict[str, Any]

# What the problem, the GPU or a debug session decides; all other fields are the tile.
_GIVEN = frozenset(
    {
        "kernel",
        "arch",
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
        "folds_heads",
        "keys_of_chunk",
        "fewest_splits",
        "gate",
        "returns_max_score",
    }
)

_REGISTERS_PER_BLOCK = 65536
# Registers of a thread beside the accumulators: addresses, row statistics, loop counters. The least
# that any configuration was seen to take, so that nothing that would not spill is left out.
_OTHER_REGISTERS = 24
# Where products bound the time more stages than these gain nothing; more are for reading memory.
_STAGES_OF_PRODUCTS = 4


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
    """Return whether a plan fits the GPU: shared memory, threads, and the registers of its
    roles. A block of the Hopper kernel that asks for more registers than it was given would wait
    for ever."""
    rows_a_warp = 64 if isinstance(plan, Sm90Plan) else 16
    sizes = (plan.block_m, plan.block_n, plan.num_stages, plan.min_blocks)
    if min(sizes) < 1 or plan.block_m % rows_a_warp or plan.block_n % 16:
        return False
    if plan.smem_bytes > smem_limits(plan.arch)[0] or plan.num_threads > 1024:
        return False
    if plan.min_blocks * plan.num_threads * 24 > _REGISTERS_PER_BLOCK:
        return False
    if isinstance(plan, Sm90Plan):
        return _is_legal_sm90(plan)
    return plan.arch >= 80 or plan.num_stages == 1


def _is_legal_sm90(plan: Sm90Plan) -> bool:
    if plan.num_consumers > 3 or plan.num_stages < 2 * plan.key_slices:
        return False
    if plan.key_slices > 1 and (plan.block_m > 64 or plan.num_stages % plan.key_slices):
        return False
    if plan.num_splits < plan.fewest_splits or (plan.num_splits > 1 and plan.varlen == "packed"):
        return False
    # Turns are given for every key tile of a block; consumers that share keys have their own.
    takes_turns = plan.num_consumers > 1 and plan.key_slices == 1
    if plan.block_n > 256 or (plan.ping_pong and not takes_turns):
        return False
    if plan.o_parts not in O_PARTS or plan.q_buffers not in Q_BUFFERS:
        return False
    return registers_asked_for(plan) <= plan.max_registers * plan.num_threads


def registers_asked_for(plan: Plan) -> int:
    """Return the registers that the roles of a block's warpgroups ask for together; 0 without
    roles."""
    if not isinstance(plan, Sm90Plan):
        return 0
    consumer, producer = plan.role_registers
    return 128 * (plan.num_consumers * consumer + producer)


def may_avoid_spills(plan: Plan) -> bool:
    """Return whether scores, output and what else a thread must hold could fit into its
    registers."""
    return spare_registers(plan) >= _OTHER_REGISTERS


def tiles(base: Plan) -> list[Plan]:
    """Return all sizes of tiles, with `base`'s other choices; `base` first."""
    found = {base: None}
    for plan in _tiles_sm90(base) if isinstance(base, Sm90Plan) else _tiles_wmma(base):
        if is_legal(plan) and may_avoid_spills(plan):
            found[plan] = None
    return list(found)


def _tiles_wmma(base: Plan) -> Iterator[Plan]:
    """Return tiles with as many blocks an SM as shared memory allows, or fewer, with more registers
    each."""
    for block_m in (64, 128):
        for block_n in (16, 32, 64, 128):
            for num_stages in (1, 2, 3):
                sizes: Tile = {"block_m": block_m, "block_n": block_n, "num_stages": num_stages}
                plan = dataclasses.replace(base, **sizes)
                by_smem = blocks_that_fit(plan.smem_bytes, plan.arch)
                most = min(5 * 128 // plan.num_threads, by_smem)
                for min_blocks in range(max(1, most - 2), most + 1):
                    yield dataclasses.replace(plan, min_blocks=min_blocks)


def _tiles_sm90(base: Sm90Plan) -> Iterator[Plan]:
    for block_m in (64, 128, 192):
        for block_n in (32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192):
            sizes: Tile = {"block_m": block_m, "block_n": block_n, "num_stages": 2}
            plan = dataclasses.replace(base, **sizes, ping_pong=block_m > 64, q_buffers=1)
            for min_blocks in (1, 2, 3):
                if base.num_stages > _STAGES_OF_PRODUCTS:  # as many keys under way on an SM
                    keys = base.num_stages * base.block_n // min_blocks
                    plan = dataclasses.replace(plan, num_stages=max(2, keys // block_n))
                yield with_o_fitted(dataclasses.replace(plan, min_blocks=min_blocks))


def schedules(base: Plan) -> list[Plan]:
    """Return what there is to choose once the tile's sizes are known, one or several choices unlike
    `base`'s."""
    if not isinstance(base, Sm90Plan):
        return []
    found = [
        dataclasses.replace(base, ping_pong=ping_pong, q_buffers=q_buffers, o_parts=o_parts)
        for ping_pong in (False, True)
        for q_buffers in Q_BUFFERS
        for o_parts in O_PARTS
    ]
    found += [dataclasses.replace(base, num_stages=stages) for stages in (2, 3, 4, 6)]
    found += [dataclasses.replace(base, num_splits=splits) for splits in (1, 2, 4, 8, 16, 32)]
    found.append(dataclasses.replace(base, key_slices=2, num_stages=4, ping_pong=False))
    return [plan for plan in dict.fromkeys(found) if plan != base and is_legal(plan)]
