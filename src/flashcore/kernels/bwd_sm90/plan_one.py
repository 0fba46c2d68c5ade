"""Plans of the backward that computes dq, dk and dv in one kernel, five products instead of seven.

`attn_bwd_delta_sm90` computes delta, `attn_bwd_dkdv_sm90` with `also_dq` adds up dq in float32, the
blocks of a head's keys one after the other in the order of the keys, and `attn_bwd_round_sm90`
scales and rounds the sums. Where those of all heads would take too much memory, the latter two are
launched for a share of the heads at a time. Plans that are not `ordered` add in any order: then
`attn_bwd_delta_sm90` clears the sums, and it, too, is launched for a share of the heads at a time.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flashcore.kernels.bwd_sm90.plan import (
    ARCH,
    DKDV_KERNEL,
    BwdSm90Plan,
    make_plan,
    obstacle_anywhere,
)
from flashcore.kernels.bwd_sm90.tiles import UNCUT, BwdTile, padded_to_16
from flashcore.kernels.fwd_sm90 import tiles as tiles_sm90
from flashcore.kernels.fwd_sm90.tiles import ROWS_OF_CONSUMER
from flashcore.kernels.fwd_wmma.plan import Plan, traits

if TYPE_CHECKING:
    from flashcore.problem import Problem

DELTA_KERNEL = "attn_bwd_delta_sm90"
ROUND_KERNEL = "attn_bwd_round_sm90"
HEAD_DIM_MAX = 128
_KEYS_OF_TILE = 128
_NEVER = 1 << 62  # tiles
_LEAST_QUERIES = 128
# With fewer queries than this, the blocks of a head wait for one another's adds at every query tile
# if many of them run at a time. With 64 heads an H200 runs two blocks of each head.
_FEW_QUERIES = 1024
_HEADS_OF_FEW_QUERIES = 64


@dataclass(frozen=True, slots=True)
class RowsPlan(BwdSm90Plan):
    """A RowsPlan is of a kernel before or behind, where a warpgroup takes 64 rows of a head."""

    @property
    def is_dq(self) -> bool:
        """Return True: the kernel goes over rows of q."""
        return True

    @property
    def is_persistent(self) -> bool:
        """Return False: a block takes 64 rows."""
        return False

    @property
    def draws_tiles(self) -> bool:
        """Return False: there is a tile for each block."""
        return False

    @property
    def num_warps(self) -> int:
        """Return the warps of one warpgroup."""
        return 4

    @property
    def row_warps(self) -> range:
        """Return all warps."""
        return range(4)

    @property
    def role_registers(self) -> tuple[int, ...]:
        """Return no registers: warps have no roles."""
        return ()

    @property
    def smem_bytes(self) -> int:
        """Return the dynamic shared memory of a block: dout and a barrier, or dq."""
        qk_cols, v_cols = tiles_sm90.padded_dims(self.head_dim, self.head_dim_v)
        if self.kernel == ROUND_KERNEL:
            return ROWS_OF_CONSUMER * 2 * qk_cols
        return ROWS_OF_CONSUMER * 2 * v_cols + 8

    @property
    def box_rows(self) -> dict[str, int]:
        """Return the tensor that the kernel reads or writes by TMA, and the rows of its boxes."""
        return {"dq" if self.kernel == ROUND_KERNEL else "dout": ROWS_OF_CONSUMER}

    @property
    def written(self) -> tuple[str, ...]:
        """Return the tensors that the kernel writes."""
        if self.kernel == ROUND_KERNEL:
            return ("dq",)
        return "delta", "dq_turns" if self.ordered else "dq_sums"

    def constants(self) -> dict[str, object]:
        """Return the kernel source's compile-time constants."""
        constants = Plan.constants(self)
        del constants["LOAD_BYTES"]
        return constants | UNCUT | {"CHUNK": self.chunk, "ORDERED": self.ordered}


class OneKernelPlans(NamedTuple):
    """Hold what such a backward pass launches, in this order."""

    delta: RowsPlan
    main: BwdSm90Plan
    round: RowsPlan


def obstacle(problem: Problem) -> str | None:
    """Return why one kernel cannot compute the gradient of a call, or None."""
    if max(problem.head_dim, problem.head_dim_v) > HEAD_DIM_MAX:
        return f"dq, dk and dv by one kernel take head_dim {HEAD_DIM_MAX} at most"
    qk_cols = tiles_sm90.padded_dims(problem.head_dim, problem.head_dim_v)[0]
    chunk = tiles_sm90.chunk_of(problem.head_dim, problem.head_dim_v)
    if max(problem.head_dim, problem.head_dim_v) > 96 and qk_cols // chunk % 2:
        return "above head_dim_v 96 one kernel for dq, dk and dv takes no such head_dim"
    if problem.softcap != 0.0 and problem.mask is not None:
        return "dq, dk and dv by one kernel take no mask tensor with soft-capping"
    if problem.mask is not None and not _has_room_for_mask(problem):
        return "a mask tensor leaves no room for dq, dk and dv by one kernel"
    if problem.varlen != "none":
        return "dq, dk and dv by one kernel take sequences of one length"
    return obstacle_anywhere(problem)


def is_bounded(problem: Problem) -> bool:
    """Return whether a causal mask or a window hides keys."""
    return problem.window_left >= 0 or problem.window_right >= 0


def tile(problem: Problem) -> tuple[BwdTile, int]:
    """Return the tile of the kernel in the middle, and its buffers of dS. Measured on an H200
    (2026-11-29), 16k tokens, hidden 2048, bfloat16; see docs/backward-one-kernel.md."""
    dim = max(problem.head_dim, problem.head_dim_v)
    if dim > 96:
        return BwdTile(64, 128, 3, 2, True, False, False), 2
    if problem.mask is not None:
        return _masked(problem, dim)
    if problem.softcap != 0.0:
        # Slopes take registers: 128 rows spill 84 to 168 bytes, and dK of the tile before, issued
        # beside S, 96 to 128 above head_dim 64; up to that it is up to 13 % slower.
        return BwdTile(64, 128, 2 if _widest(problem) > 96 else 3, 2, False, False, False), 1
    if dim <= 64:
        if not is_bounded(problem) and (problem.dtype == "float16" or 32 < dim <= 48):
            return BwdTile(64, 128, 3, 3, True, False, False), 2  # 128 rows spill 16 to 40 bytes
        if not is_bounded(problem) and problem.seqlen_q <= 4096:
            return BwdTile(128, 128, 2, 2, False, False, False), 2  # by 2 to 3 %
        return BwdTile(128, 128, 3, 2, False, False, False), 1
    if _widest(problem) > 96:
        # Columns padded to 128 leave room for two tiles of Q; not measured on a GPU.
        return BwdTile(64, 128, 2, 2, not is_bounded(problem), False, False), 1
    return BwdTile(64, 128, 3, 2, not is_bounded(problem), False, False), 1


def _widest(problem: Problem) -> int:
    """Return the columns that the wider of a key and a value takes in shared memory."""
    return max(tiles_sm90.padded_dims(problem.head_dim, problem.head_dim_v))


def _has_room_for_mask(problem: Problem) -> bool:
    """Return whether shared memory has room for a tile of every warp's part of the mask."""
    assert problem.mask is not None
    if problem.mask.dtype == "bool" and max(problem.head_dim, problem.head_dim_v) > 96:
        return True
    return _widest(problem) <= (64 if problem.mask.dtype == "float32" else 96)


def _masked(problem: Problem, dim: int) -> tuple[BwdTile, int]:
    """Return the tile with a mask tensor up to head_dim 96, and the buffers of dS. Measured on an
    H200 (2026-11-30); see docs/ladder-backward.md."""
    assert problem.mask is not None
    is_wide = problem.mask.dtype == "float32"
    # In float16, 128 rows spill 20 to 68 bytes without a bound.
    spills = problem.dtype == "float16" and not is_bounded(problem)
    if dim <= 64 and not is_wide and not spills:
        return BwdTile(128, 128, 2, 2, False, False, False), 1
    return BwdTile(64, 128, 3, 2, False, is_wide, False), 1


def pays(problem: Problem, num_bytes: int) -> bool:
    """Return whether one kernel is faster than two for a problem that has no obstacle, with so much
    memory to add up dq in."""
    at_once = min(num_bytes // _sums_bytes(problem), problem.batch * problem.num_heads_kv)
    return at_once * _tiles_of_head(problem) >= least_tiles(problem)


def least_tiles(problem: Problem) -> int:
    """Return how many tiles of keys, of all heads that are computed at a time, make one kernel
    faster than two. Measured on an H200 (2026-12-01), bfloat16; see docs/backward-one-kernel.md."""
    if problem.seqlen_q < _LEAST_QUERIES:
        return _NEVER
    left, right = problem.window_left, problem.window_right
    window = left + right + 1 if min(left, right) >= 0 else math.inf
    if window < 64:
        return _NEVER  # not measured
    is_wide = max(problem.head_dim, problem.head_dim_v) > 96
    if window < 256:
        return 2048  # then it is 1.01 to 1.24 times as fast, with 512 tiles 0.95 to 1.0 times
    if problem.seqlen_q < _FEW_QUERIES:
        return max(1024 if is_wide else 512, _HEADS_OF_FEW_QUERIES * _tiles_of_head(problem))
    least = (512 if is_wide else 256) * (2 if is_bounded(problem) else 1)
    return least // 2 if problem.softcap else least  # which takes two kernels 1.5 times as long


def _tiles_of_head(problem: Problem) -> int:
    """Return how many tiles the keys of a head make."""
    return -(-problem.seqlen_k // _KEYS_OF_TILE)


def _sums_bytes(problem: Problem) -> int:
    """Return the bytes of the sums of those heads of q that share a head of k; 1 of none."""
    return max(1, math.prod(sums_shape(problem, 1)) * 4)


def shares(problem: Problem, num_bytes: int) -> list[tuple[int, int]]:
    """Return the heads of k and v that are computed at a time, as first one and number, counted
    over the batch: as many as have room for their sums, but one at least."""
    total = problem.batch * problem.num_heads_kv
    at_once = max(1, num_bytes // _sums_bytes(problem))
    num_shares = -(-total // at_once)
    ends = [total * (i + 1) // num_shares for i in range(num_shares)]
    return [(begin, end - begin) for begin, end in zip([0, *ends], ends, strict=False)]


def launches(
    problem: Problem, plans: OneKernelPlans, num_bytes: int
) -> tuple[list[BwdSm90Plan], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Return what a backward pass launches, in this order, and shapes and dtypes, by name, of the
    memory that it takes meanwhile."""
    of = shares(problem, num_bytes)
    heads = max(count for _, count in of)
    made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "dq_sums": (sums_shape(problem, heads), torch.float32),
    }
    if plans.main.ordered:
        made["dq_turns"] = turns_shape(problem), torch.int32
    if len(of) == 1:
        return list(plans), made
    # Turns are those of all heads, sums are cleared for each share.
    once = [plans.delta] if plans.main.ordered else []
    others = (dataclasses.replace(plan, heads=share) for share in of for plan in plans[len(once) :])
    return [*once, *others], made


def sums_shape(problem: Problem, heads: int) -> tuple[int, int, int]:
    """Return the shape of the float32 sums of dq of so many heads of k and v: groups of 64 rows, in
    the order of registers."""
    groups = -(-problem.seqlen_q // ROWS_OF_CONSUMER)
    return heads * problem.group_size, groups, ROWS_OF_CONSUMER * padded_to_16(problem.head_dim)


def turns_shape(problem: Problem) -> tuple[int, int]:
    """Return the shape of the counters of who has added, one for each group of 64 rows."""
    return sums_shape(problem, problem.batch * problem.num_heads_kv)[:2]


def any_order_pays(problem: Problem) -> bool:
    """Return whether adding to dq in any order is expected to be faster than in that of the keys:
    by some 3 % from 2048 queries on, measured on an H200 (2026-11-30); with fewer, clearing the
    sums takes as long as the order."""
    return any_order_may_pay(problem) and problem.seqlen_q >= 2048


def any_order_may_pay(problem: Problem) -> bool:
    """Return the same of any number of queries. Up to head_dim 96 the order costs nothing; with a
    mask or soft-capping it is not measured."""
    is_measured = problem.mask is None and problem.softcap == 0.0
    return max(problem.head_dim, problem.head_dim_v) > 96 and is_measured


def in_any_order(plans: OneKernelPlans) -> OneKernelPlans:
    """Return the plans of the same pass with blocks that add to dq in any order."""
    delta, main, rounding = (dataclasses.replace(plan, ordered=False) for plan in plans)
    return OneKernelPlans(delta, main, rounding)  # type: ignore[arg-type]


def select_one_kernel_plans(problem: Problem) -> OneKernelPlans:
    """Return the plans of a problem that has no obstacle, with sums in the order of the keys."""
    of_main, ds_stages = tile(problem)
    of_problem = traits(problem) | tiles_sm90.mask_traits(problem) | {"folds_heads": 0}
    return make_plans(of_main, of_problem, ds_stages)


def make_plans(of_main: BwdTile, of_problem: dict[str, Any], ds_stages: int = 1) -> OneKernelPlans:
    """Return the plans with a tile of the kernel in the middle; `of_problem` is what plan.traits
    gives."""
    fields = of_problem | {"also_dq": True, "ds_stages": ds_stages}
    common: dict[str, Any] = {
        "arch": ARCH,
        "block_m": ROWS_OF_CONSUMER,
        "block_n": ROWS_OF_CONSUMER,
        "num_stages": 1,
        "min_blocks": 4,
    }
    # These kernels see no mask: one machine code serves with all and without.
    of_rows = {name: x for name, x in of_problem.items() if not name.startswith("mask")}
    delta, rounding = (
        RowsPlan(kernel=kernel, **common, **of_rows) for kernel in (DELTA_KERNEL, ROUND_KERNEL)
    )
    return OneKernelPlans(delta, make_plan(DKDV_KERNEL, of_main, fields), rounding)
