"""Describe the Hopper kernel, attn_fwd_sm90.cuh: what kernels/kernel.py asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from flashcore.kernels import stream_k
from flashcore.kernels.fwd_sm90 import candidates as candidates_sm90
from flashcore.kernels.fwd_sm90 import obstacles, shortlist, stages
from flashcore.kernels.fwd_sm90 import params as params_sm90
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
from flashcore.kernels.fwd_sm90.plan import O_PARTS, Q_BUFFERS, Sm90Plan
from flashcore.kernels.fwd_sm90.tiles import ROWS_OF_CONSUMER
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.kernel import ForwardKernel, Pointers, Tile
from flashcore.problem import Problem

# Where products bound the time more stages than these gain nothing; more are for reading memory.
_STAGES_OF_PRODUCTS = 4


class Sm90Kernel(ForwardKernel[Sm90Plan]):
    """An Sm90Kernel is the Hopper kernel. See `ForwardKernel`."""

    shown_sizes: ClassVar[tuple[int, int]] = (300, 96)  # several column chunks
    prefers_aligned_masks: ClassVar[bool] = True

    def registers_between_tiles(self, plan: Sm90Plan) -> int | None:
        """Return what makes up for another tile, see `Kernel`. Warps that share a tile have other
        accumulators."""
        return None if plan.strips else 32 if plan.cache_dtype else 16

    def obstacle(self, problem: Problem) -> str | None:
        """Return why the kernel cannot serve a problem, or None."""
        return obstacles.obstacle(problem)

    def unreadable(self, problem: Problem) -> Mapping[str, str]:
        """Return the tensors that TMA cannot read as they lie, and why."""
        return obstacles.unreadable(problem)

    def traits(self, problem: Problem, gate: str | None = None) -> dict[str, Any]:
        """Return the fields of a plan that the problem alone decides."""
        return candidates_sm90.traits_sm90(problem, gate)

    def candidates(self, problem: Problem, arch: int, gate: str | None = None) -> list[Plan]:
        """Return plans for a problem, best first; none where no tile fits into shared memory."""
        return candidates_sm90.candidates(problem, gate)

    def notes(self, problem: Problem, plan: Sm90Plan) -> list[str]:
        """Return what of a call makes the kernel faster or slower."""
        notes = []
        if problem.mask and plan.mask_is_shifted:
            notes.append(
                f"the mask's rows are aligned to {problem.mask.load_bytes} bytes only: they are "
                f"copied {plan.mask_load_bytes} bytes at a time and read element by element; rows "
                "that start 16 bytes apart, or a multiple of that, are faster"
            )
        elif problem.mask and plan.mask_load_bytes < 4:
            notes.append(
                "the mask's keys are no neighbours in memory: its elements are copied one by one; "
                "a contiguous mask is faster"
            )
        if plan.num_splits > 1:
            notes.append(
                f"the keys of {params_sm90.num_row_tiles(problem, plan)} row tiles are split over "
                f"{plan.num_splits} blocks each, as few rows leave SMs idle; see "
                "kernels/fwd_sm90/splits.py"
            )
        if plan.stream_k:
            notes.append(stream_k.NOTE)
        if plan.page_size:
            warps = "two warps load pages, one keys and one values"
            notes.append(warps if plan.loaders > 1 else "one warp loads the pages of a block")
        return notes

    def num_pieces(self, problem: Problem, plan: Sm90Plan) -> int:
        """Return the number of row tiles, or of parts of their keys; where the device cuts them,
        as many as there are at most."""
        return params_sm90.num_pieces(problem, plan)

    def scratch_shapes(self, problem: Problem, plan: Sm90Plan) -> dict[str, tuple[int, ...]]:
        """Return counters, and the shares of blocks that share the keys of row tiles."""
        return super().scratch_shapes(problem, plan) or params_sm90.split_shapes(problem, plan)

    def build_params(
        self, problem: Problem, plan: Sm90Plan, pointers: Pointers, num_blocks: int
    ) -> params_sm90.AttnSm90Params | params_sm90.AttnSm90GateParams:
        """Return the kernel's argument, with tensor maps as the simulator reads them."""
        return params_sm90.build_params_sm90(problem, plan, pointers, num_blocks)

    def set_keys(
        self, params: Any, problem: Problem, plan: Sm90Plan, pointers: Pointers, num_blocks: int
    ) -> None:
        """Write what depends on the keys, the mask and their number alone."""
        params_sm90.set_keys_sm90(params, problem, plan, pointers, num_blocks)

    @property
    def attn_offset(self) -> int:
        """Return where AttnParams begins: behind the tensor maps."""
        return params_sm90.AttnSm90Params.attn.offset

    def pointer_fields(self, name: str) -> tuple[str, ...]:
        """Return the field in AttnParams, and the base of the tensor's map if it has one."""
        tensor_map = "o" if name == "out" else name
        return (f"attn.{name}", *((f"{tensor_map}_map.base",) if tensor_map in self.maps else ()))

    def barrier_places(self, plan: Sm90Plan) -> list[tuple[str, int]]:
        """Return for each mbarrier the member of `Barriers` (pipeline_sm90.cuh) that it belongs to,
        and its index there; a test compares the two."""
        slots = plan.q_buffers * plan.row_groups
        members = {"q_full": slots, "q_empty": slots}
        members |= dict.fromkeys(("k_full", "k_empty", "v_full", "v_empty"), plan.num_stages)
        if plan.key_slices > 1:
            members |= {"merge_full": 1, "merge_empty": 1}
        if plan.converts:
            of_loads = ("k_load_full", "k_load_empty", "v_load_full", "v_load_empty")
            members |= dict.fromkeys(of_loads, plan.load_stages)
        return [(name, index) for name, count in members.items() for index in range(count)]

    def least_rows(self, plan: Sm90Plan) -> int:
        """Return the rows of a consumer, or all where its warps share keys."""
        return plan.rows_of_group

    def is_legal(self, plan: Sm90Plan) -> bool:
        """Return whether a plan fits the GPU, and the registers of its roles do: a block that asks
        for more than it was given would wait for ever."""
        if not super().is_legal(plan):
            return False
        if plan.num_consumers > 3 or plan.num_stages < 2 * plan.key_slices:
            return False
        if plan.has_float8 != (plan.load_stages > 0 or plan.strips > 0):
            return False
        if plan.strips and (plan.converts or not candidates_sm90.can_share_tiles(plan)):
            return False
        if plan.has_float8 and plan.key_slices > 1:
            return False
        if plan.loaders > 1 and not candidates_sm90.two_can_load(plan):
            return False
        if plan.key_slices > 1 and (plan.block_m > 64 or plan.num_stages % plan.key_slices):
            return False
        if plan.num_splits < plan.fewest_splits:
            return False
        # Packed queries are cut by what the batch holds, and by the device alone.
        is_uneven = plan.num_splits > 1 or (plan.stream_k and plan.batch_invariant)
        if plan.packs_queries and is_uneven:
            return False
        if plan.stream_k and plan.num_splits > 1:
            return False
        # Turns are given for every key tile of a block; consumers that share keys have their own.
        takes_turns = plan.num_consumers > 1 and plan.key_slices == 1
        if plan.block_n > 256 or (plan.ping_pong and not takes_turns):
            return False
        if plan.o_parts not in O_PARTS or plan.q_buffers not in Q_BUFFERS:
            return False
        # One instruction of P V holds O; ptxas wants some 30 registers beside it.
        if plan.max_registers < plan.head_dim_v // 2 + 32 or candidates_sm90.spills(plan):
            return False
        return plan.registers_asked_for <= plan.max_registers * plan.num_threads

    def tiles(self, base: Sm90Plan) -> Sequence[Sm90Plan]:
        """Return all sizes of tiles, with O in as few parts as fit."""
        return tuple(_tiles(base))

    def schedules(self, base: Sm90Plan) -> Sequence[Sm90Plan]:
        """Return plans that differ in one or several of what is not a size."""
        found = [
            dataclasses.replace(base, ping_pong=ping_pong, q_buffers=q_buffers, o_parts=o_parts)
            for ping_pong in (False, True)
            for q_buffers in Q_BUFFERS
            for o_parts in O_PARTS
        ]
        found += [dataclasses.replace(base, num_stages=count) for count in (2, 3, 4, 6)]
        found += [dataclasses.replace(base, num_splits=count) for count in (1, 2, 4, 8, 16, 32)]
        found.append(dataclasses.replace(base, key_slices=2, num_stages=4, ping_pong=False))
        return found

    def shortlist(self, base: Sm90Plan) -> Sequence[Tile]:
        """Return the tiles worth trying for a head_dim."""
        return shortlist.of_head_dim(max(base.head_dim, base.head_dim_v))

    def fitted(self, plan: Sm90Plan) -> Sm90Plan:
        """Return the plan with O in as few parts as fit."""
        return candidates_sm90.fitted(plan)


def _tiles(base: Sm90Plan) -> Iterator[Sm90Plan]:
    for block_m in (64, 128, 192):
        for block_n in (32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192):
            sizes: Tile = {"block_m": block_m, "block_n": block_n, "num_stages": 2}
            sized = dataclasses.replace(base, **sizes, ping_pong=block_m > 64, q_buffers=1)
            for min_blocks in (1, 2, 3):
                if base.num_stages > _STAGES_OF_PRODUCTS:  # as many keys under way on an SM
                    keys = base.num_stages * base.block_n // min_blocks
                    sized = dataclasses.replace(sized, num_stages=max(2, keys // block_n))
                yield candidates_sm90.fitted(dataclasses.replace(sized, min_blocks=min_blocks))


SM90 = Sm90Kernel(
    name=plan_sm90.KERNEL,
    backend="sm90",
    title="the Hopper kernel",
    plan=Sm90Plan,
    only_arch=plan_sm90.ARCH,
    stages=stages.STAGES,
    outside=stages.OUTSIDE,
    phases=stages.PHASES,
    params=params_sm90.AttnSm90Params,
    maps=params_sm90.MAPS,
    rows_of_warp=ROWS_OF_CONSUMER,
    off_under_a_gate=plan_sm90.OFF_UNDER_A_GATE,
    beside_the_tile=("stream_k", "load_stages", "strips", "loaders"),
    rules="tiles come from rules, made from measurements on Hopper GPUs; see "
    "kernels/fwd_sm90/tiles.py",
)
