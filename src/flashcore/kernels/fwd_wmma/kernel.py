"""Describe the portable kernel, attn_fwd_wmma.cuh: what kernels/kernel.py asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from flashcore.kernels import stream_k
from flashcore.kernels.fwd_wmma import params as params_wmma
from flashcore.kernels.fwd_wmma import plan as plan_wmma
from flashcore.kernels.fwd_wmma import stages
from flashcore.kernels.fwd_wmma import tiles as tiles_wmma
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.kernel import ForwardKernel, Pointers, Tile
from flashcore.kernels.limits import blocks_that_fit
from flashcore.kernels.stream_k import ROWS_OF_GROUP
from flashcore.problem import Problem
from flashcore.problem.folding import as_launched
from flashcore.problem.validation import HEAD_DIM_MULTIPLE

LEAST_BYTES_OF_FLOAT8 = 4  # that one thread copies, and widens, at once


class WmmaKernel(ForwardKernel[Plan]):
    """A WmmaKernel is the portable kernel. See `ForwardKernel`."""

    def registers_between_tiles(self, plan: Plan) -> int | None:
        """Return what makes up for another tile, see `Kernel`."""
        return 48

    def obstacle(self, problem: Problem) -> str | None:
        """Return why the kernel cannot serve a problem, or None."""
        if not problem.cache_dtype:
            return None
        is_odd = problem.head_dim % HEAD_DIM_MULTIPLE or problem.head_dim_v % HEAD_DIM_MULTIPLE
        is_strided = "k" in problem.strided or "v" in problem.strided
        if is_odd or is_strided or problem.load_bytes < LEAST_BYTES_OF_FLOAT8:
            return (
                "the portable kernel reads caches of 8 bits in contiguous rows of a multiple of "
                f"{HEAD_DIM_MULTIPLE} elements that start at multiples of {LEAST_BYTES_OF_FLOAT8} "
                "bytes"
            )
        return None

    def traits(self, problem: Problem, gate: str | None = None) -> dict[str, Any]:
        """Return the fields of a plan that the problem alone decides."""
        return plan_wmma.traits(problem, gate)

    def candidates(self, problem: Problem, arch: int, gate: str | None = None) -> list[Plan]:
        """Return legal plans for a problem, best first by rules."""
        return tiles_wmma.candidates(problem, arch, gate)

    def budget_of(self, plan: Plan) -> tuple[int, int] | None:
        """Return the budget of head_dim 64, where it holds."""
        return self.budget if tiles_wmma.has_tight_budget(plan) else None

    def notes(self, problem: Problem, plan: Plan) -> list[str]:
        """Return what of a call makes the kernel faster or slower."""
        return [stream_k.NOTE] if plan.stream_k else []

    def num_pieces(self, problem: Problem, plan: Plan) -> int:
        """Return the number of row tiles of all heads; where the device cuts their keys, of parts,
        as many as there are at most."""
        if plan.stream_k:
            return stream_k.num_pieces(problem, plan)
        return params_wmma.grid_size(problem, plan)

    def scratch_shapes(self, problem: Problem, plan: Plan) -> dict[str, tuple[int, ...]]:
        """Return counters, and the shares of blocks that share the keys of row tiles."""
        return stream_k.share_shapes(problem, plan) if plan.stream_k else {}

    def build_params(
        self, problem: Problem, plan: Plan, pointers: Pointers, num_blocks: int
    ) -> params_wmma.AttnParams:
        """Return the kernel's argument."""
        argument = params_wmma.build_params(problem, plan, pointers)
        if plan.stream_k:
            stream_k.set_ranges(argument, problem, plan, num_blocks)
        return argument

    def set_keys(
        self, params: Any, problem: Problem, plan: Plan, pointers: Pointers, num_blocks: int
    ) -> None:
        """Write what depends on the keys, the mask and their number alone."""
        params_wmma.set_keys(params, as_launched(problem, plan.folds_heads))

    def is_legal(self, plan: Plan) -> bool:
        """Return whether a plan fits the GPU. Without asynchronous copies there is one stage, and
        64 rows add up what blocks hand over."""
        if plan.stream_k and plan.block_m != ROWS_OF_GROUP:
            return False
        if plan.packs_queries and plan.folds_heads and not plan.stream_k:
            return False  # row_tile knows one head at a time
        return super().is_legal(plan) and (plan.arch >= 80 or plan.num_stages == 1)

    def tiles(self, base: Plan) -> Sequence[Plan]:
        """Return tiles with as many blocks an SM as shared memory allows, or fewer, with more
        registers each."""
        return tuple(_tiles(base))


def _tiles(base: Plan) -> Iterator[Plan]:
    for block_m in (64, 128):
        for block_n in (16, 32, 64, 128):
            for num_stages in (1, 2, 3):
                sizes: Tile = {"block_m": block_m, "block_n": block_n, "num_stages": num_stages}
                sized = dataclasses.replace(base, **sizes)
                by_smem = blocks_that_fit(sized.smem_bytes, sized.arch)
                most = min(5 * 128 // sized.num_threads, by_smem)
                for min_blocks in range(max(1, most - 2), most + 1):
                    yield dataclasses.replace(sized, min_blocks=min_blocks)


WMMA = WmmaKernel(
    name=plan_wmma.KERNEL,
    backend="wmma",
    title="the portable kernel",
    plan=Plan,
    only_arch=None,
    stages=stages.STAGES,
    outside=stages.OUTSIDE,
    phases=stages.PHASES,
    params=params_wmma.AttnParams,
    off_under_a_gate={"keys_of_chunk": 0, "stream_k": False},
    beside_the_tile=("keys_of_chunk", "stream_k"),
    budget=(plan_wmma.HEAD_DIM_64_MAX_REGISTERS, plan_wmma.HEAD_DIM_64_MAX_SMEM_BYTES),
    rules="tiles are ranked by warps resident on an SM, then the block_n that leaves registers "
    "for more warps (32), then small block_m; see kernels/fwd_wmma/tiles.py",
)
