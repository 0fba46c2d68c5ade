"""Choose plans of the Hopper kernel: which tiles fit a problem, in what order. The rules for tiles
are in kernels/fwd_sm90/tiles.py, and in float8/tiles.py for caches of 8 bits."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from flashcore.kernels.fwd_sm90 import tiles as tiles_sm90
from flashcore.kernels.fwd_sm90.float8.strips import ROWS_OF_STRIP
from flashcore.kernels.fwd_sm90.float8.tiles import float8_tiles
from flashcore.kernels.fwd_sm90.obstacles import loads_whole_rows
from flashcore.kernels.fwd_sm90.plan import (
    ARCH,
    GATES,
    KERNEL,
    O_PARTS,
    OFF_UNDER_A_GATE,
    Sm90Plan,
)
from flashcore.kernels.fwd_sm90.tiles import Tile
from flashcore.kernels.fwd_wmma.plan import Plan, traits
from flashcore.kernels.limits import blocks_that_fit, smem_limits
from flashcore.problem.exactness import fewest_splits, is_cut
from flashcore.problem.folding import heads_of_packed_rows
from flashcore.problem.problem import PACKS_QUERIES

if TYPE_CHECKING:
    from flashcore.problem import Problem


def can_share_tiles(plan: Sm90Plan) -> bool:
    """Return whether warps can share a tile of 8 bits, each with 32 keys or a multiple of them, and
    tiles begin where a swizzle's pattern does. A mask, packed queries and gates belong to
    warpgroups."""
    fits = plan.block_m == ROWS_OF_STRIP * plan.strips and plan.strips in (1, 2, 4)
    fits &= plan.warp_keys % 32 == 0 and plan.warp_keys > 0
    fits &= plan.strips * plan.q_buffers % 2 == 0
    fits &= not plan.ping_pong and plan.mask is None
    return fits and plan.gate is None and plan.varlen not in PACKS_QUERIES


def _registers_left(plan: Sm90Plan) -> int:
    """Return the registers of a consumer thread beside S, P and O."""
    held = (plan.warp_keys + plan.head_dim_v) // 2 + plan.warp_keys // 4
    if plan.strips:  # of 8 rows, not 16
        held = (held + plan.head_dim // 4) * plan.warp_strips // 2
    held += plan.head_dim // 4 * plan.q_in_registers
    return plan.role_registers[0] - held


def _has_registers(plan: Sm90Plan) -> bool:
    """Return whether a consumer thread can hold S, P, O and some 32 more. The rules are right about
    that where the producer's warpgroup is small; a warp that deals out tiles, or finds pages, takes
    from it."""
    return _registers_left(plan) >= 32


def spills(plan: Sm90Plan) -> bool:
    """Return whether a tile leaves a consumer thread too few registers: of 192 rows with wide key
    tiles ptxas spilled 24 to 502 bytes of what is left below this, and nothing above."""
    if plan.has_softcap and plan.overlaps:  # its polynomial goes on beside P V
        return _registers_left(plan) < 24 + plan.warp_keys // 4
    is_plain = plan.mask is None and not plan.has_window_left and not plan.has_sinks
    return _registers_left(plan) < (28 if is_plain else 32)


def traits_sm90(problem: Problem, gate: str | None = None) -> dict[str, Any]:
    """Return the fields of an Sm90Plan that the problem alone decides; see plan.traits."""
    fields = traits(problem, gate)
    if gate is None:
        fields["fewest_splits"] = fewest_splits(problem)
        fields["batch_invariant"] = problem.batch_invariant
        fields["folds_heads"] = fields["folds_heads"] or heads_of_packed_rows(problem)
    fields["whole_rows"] = loads_whole_rows(problem)
    return fields | tiles_sm90.mask_traits(tiles_sm90.folded(problem, fields["folds_heads"]))


def candidates(problem: Problem, gate: str | None = None) -> list[Plan]:
    """Return tile configurations for a problem that the kernel can serve, best first. With a debug
    gate see OFF_UNDER_A_GATE.

    Raises:
        ValueError: the kernel has no such gate.
    """
    if gate is not None and gate not in GATES:
        raise ValueError(f"gate={gate!r}: the Hopper kernel has the gates {', '.join(GATES)}")
    plans: list[Plan | None] = []
    of_problem = traits_sm90(problem, gate)
    folded = of_problem["folds_heads"]
    fields = tuple(of_problem.items())
    launched = tiles_sm90.folded(problem, folded)
    tiles = tiles_sm90.tiles(launched, max(1, folded), problem.seqlen_q)
    if problem.cache_dtype:
        tiles = float8_tiles(launched, max(1, folded))
    if problem.batch_invariant and gate is None:
        tiles = tiles_sm90.batch_invariant_tiles(launched, is_cut(problem))
    for tile in tiles:
        if gate is not None:
            if tile.strips:
                continue  # they have no stages to be shown
            tile = tile._replace(**OFF_UNDER_A_GATE)
        elif tile.num_splits < of_problem["fewest_splits"]:
            tile = tile._replace(num_splits=of_problem["fewest_splits"], stream_k=False)
        plans.append(_plan(tile, gate, fields))
    return [plan for plan in plans if plan is not None]


def fitted(plan: Sm90Plan) -> Sm90Plan:
    """Return the plan with O in as few parts as let `min_blocks` blocks, or one if they never do,
    fit into the shared memory of an SM; the last that was tried, if not even one does. Where two
    warps cannot load, one does."""
    if not two_can_load(plan):
        plan = dataclasses.replace(plan, loaders=1)
    found = [dataclasses.replace(plan, o_parts=o_parts) for o_parts in O_PARTS]
    for num_blocks in (plan.min_blocks, 1):
        for changed in found:
            if blocks_that_fit(changed.smem_bytes, ARCH) >= num_blocks:
                return changed
    return found[-1]


def two_can_load(plan: Sm90Plan) -> bool:
    """Return whether one warp may load keys and another values: both find a block's pieces alone,
    and lanes load boxes of pages."""
    in_boxes = plan.page_size > 0 and plan.box_rows < plan.block_n
    return in_boxes and plan.shares_keys and not plan.converts


def _loaders(plan: Sm90Plan) -> int:
    """Return how many warps load: two where boxes of pages are many beside their bytes (B128 H32/32
    D64 in pages of 16: 122.2 us instead of 128.5; no difference at head_dim 128 and 256)."""
    narrow = max(tiles_sm90.padded_dims(plan.head_dim, plan.head_dim_v)) <= 64
    # Packed sequences are harder to walk over: that would spill.
    is_easy = plan.varlen == "pages" and not plan.has_float8
    return 2 if narrow and is_easy and two_can_load(plan) else 1


@functools.lru_cache(maxsize=4096)
def _plan(tile: Tile, gate: str | None, fields: tuple[tuple[str, Any], ...]) -> Sm90Plan | None:
    """Return the plan with a tile, O in as few parts as fit; None if no plan with it fits. Lengths
    come and go, tiles stay: a plan costs more than to find one."""
    of_problem = dict(fields)
    of_problem["folds_heads"] //= tile.parts
    sizes = tile._asdict()
    del sizes["parts"]
    plan = Sm90Plan(
        kernel=KERNEL, arch=ARCH, lazy_rescale=gate is None, gate=gate, **sizes, **of_problem
    )
    is_tight = plan.varlen in PACKS_QUERIES or plan.page_size or plan.has_float8
    if is_tight and not _has_registers(plan):
        return None
    plan = dataclasses.replace(fitted(plan), loaders=_loaders(plan))
    return plan if plan.smem_bytes <= smem_limits(ARCH)[0] else None
