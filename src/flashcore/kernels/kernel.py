"""A kernel is one object, which answers for itself: nobody outside of `kernels/` asks which it is.

A Plan has what the kernel's source text depends on. The classes here have everything else that the
host needs; the `kernel.py` of a kernel's folder makes its object, and kernels/registry.py lists
them all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.limits import smem_limits
from flashcore.kernels.stage import Stage
from flashcore.problem import Problem

# The fields of a plan that make its tile.
Tile = dict[str, Any]
Pointers = dict[str, int | None]
P = TypeVar("P", bound=Plan)

_REGISTERS_PER_BLOCK = 65536


@dataclass(frozen=True, eq=False)
class Kernel(Generic[P]):
    """A kernel is a file of device text, `NAME.cuh`, and what the host must know to run it and to
    take it apart.

    Args:
        name: that of the file and of the function in it.
        backend: what users call it, "wmma" or "sm90"; kernels that work together share it.
        title: for messages.
        plan: class of its plans.
        only_arch: the architecture it is for, None for every one.
        stages: in which `isolate` runs it, in order.
        outside: phases that an alarm may come from besides, and where to look then.
        phases: to which stage or phase a device function belongs.
    """

    name: str
    backend: str
    title: str
    plan: type[P]
    only_arch: int | None
    stages: tuple[Stage, ...]
    outside: Mapping[str, str]
    phases: Mapping[str, str]

    is_backward: ClassVar[bool] = False
    # Length and head_dim that show the most in a small call: several key tiles, tails everywhere.
    shown_sizes: ClassVar[tuple[int, int]] = (150, 64)

    @property
    def gates(self) -> tuple[str, ...]:
        """Return the names of its debug gates."""
        return tuple(stage.gate for stage in self.stages if stage.gate is not None)

    def suspects_of(self, name: str) -> str | None:
        """Return where to look when a stage, or a phase outside of them, is the first wrong one."""
        return ({stage.name: stage.suspects for stage in self.stages} | dict(self.outside)).get(
            name
        )

    def registers_between_tiles(self, plan: P) -> int | None:
        """Return how many registers more a thread must have, beside its accumulators, than with
        another tile, so that a plan does not spill unless the other does; None if none are known to
        be enough. See selection/compile_gate.py."""
        return None

    def serves(self, arch: int) -> bool:
        """Return whether it runs on an architecture, 90 for sm_90."""
        return self.only_arch in (None, arch)

    def num_pieces(self, problem: Problem, plan: P) -> int:
        """Return in how many pieces blocks take the work of a launch."""
        raise NotImplementedError

    def num_blocks(self, problem: Problem, plan: P, at_once: int) -> int:
        """Return the blocks of a launch: one for each piece; of a persistent kernel at most as many
        as run `at_once`."""
        pieces = self.num_pieces(problem, plan)
        return min(pieces, at_once) if plan.is_persistent else pieces

    def barrier_places(self, plan: P) -> list[tuple[str, int]]:
        """Return a name and an index for each mbarrier, in the order of their array."""
        return []

    # Tuning

    def is_legal(self, plan: P) -> bool:
        """Return whether a plan fits the GPU: shared memory, threads and registers."""
        raise NotImplementedError

    def tiles(self, base: P) -> Sequence[P]:
        """Return all sizes of tiles that there are to try, legal or not, with `base`'s other
        choices."""
        raise NotImplementedError

    def schedules(self, base: P) -> Sequence[P]:
        """Return what there is to choose, legal or not, once the sizes of a tile are known."""
        return ()

    def shortlist(self, base: P) -> Sequence[Tile] | None:
        """Return the tiles worth trying where time is short; None for all sizes."""
        return None

    def fitted(self, plan: P) -> P:
        """Return a plan whose tile was changed, with the fields of it that follow from others."""
        return plan

    def variant_of(self, plan: P) -> str:
        """Return what tells a plan from others of this kernel that compute something else; "" where
        a plan's tile is all that differs."""
        return ""


@dataclass(frozen=True, eq=False)
class ForwardKernel(Kernel[P]):
    """A ForwardKernel is a kernel that computes out and lse of a Problem.

    Args:
        params: the kernel's argument, a ctypes mirror that holds AttnParams.
        maps: those of q, k, v and o (out) that it reads and writes by TMA; the argument has a
            tensor map `NAME_map` of each.
        rows_of_warp: rows of a tile are a multiple of these.
        off_under_a_gate: fields of a tile as every debug gate leaves them.
        beside_the_tile: fields of a plan that no tile has, and a debug session may change.
        budget: at head_dim 64, registers of a thread and bytes of shared memory; None for no limit.
        rules: how its tiles are chosen where nothing was measured, for `explain`.
    """

    params: type[ctypes.Structure]
    maps: tuple[str, ...] = ()
    rows_of_warp: int = 16
    off_under_a_gate: Mapping[str, Any] = field(default_factory=dict)
    beside_the_tile: tuple[str, ...] = ()
    budget: tuple[int, int] | None = None
    rules: str = ""

    # Whether rows of a mask that begin at multiples of 16 bytes are read so much faster that a copy
    # may pay (backends/readable.py).
    prefers_aligned_masks: ClassVar[bool] = False

    def obstacle(self, problem: Problem) -> str | None:
        """Return why the kernel cannot serve a problem that its architecture could, or None."""
        return None

    def unreadable(self, problem: Problem) -> Mapping[str, str]:
        """Return those of "q", "k" and "v" that it cannot read as they lie, though their rows are
        contiguous, and why."""
        return {}

    def traits(self, problem: Problem, gate: str | None = None) -> dict[str, Any]:
        """Return the fields of a plan that the problem alone decides."""
        raise NotImplementedError

    def candidates(self, problem: Problem, arch: int, gate: str | None = None) -> list[Plan]:
        """Return legal plans for a problem, best first by rules; none where no tile fits.

        Raises:
            ValueError: the kernel has no such gate.
        """
        raise NotImplementedError

    def budget_of(self, plan: P) -> tuple[int, int] | None:
        """Return `budget` as far as a plan has to keep to it, else None."""
        return self.budget

    def notes(self, problem: Problem, plan: P) -> list[str]:
        """Return for `explain` what of a call makes this kernel faster or slower."""
        return []

    # Launches

    def scratch_shapes(self, problem: Problem, plan: P) -> dict[str, tuple[int, ...]]:
        """Return what a launch needs beside its tensors, by field of AttnParams: counters, int32, 0
        between launches; and shares, float32."""
        return {"tile_counter": (1,)} if plan.draws_tiles else {}

    def build_params(
        self, problem: Problem, plan: P, pointers: Pointers, num_blocks: int
    ) -> ctypes.Structure:
        """Return the kernel's argument, with tensor maps as the simulator reads them.

        Args:
            problem: shapes, strides and options.
            plan: tiles and gate.
            pointers: address by field name, see fwd_wmma/params.py.
            num_blocks: of the launch.

        Raises:
            NotImplementedError: the problem is too large for one launch.
        """
        raise NotImplementedError

    def set_keys(
        self, params: Any, problem: Problem, plan: P, pointers: Pointers, num_blocks: int
    ) -> None:
        """Write what depends on the keys, the mask and their number alone into the argument of a
        problem that differs in these alone."""
        raise NotImplementedError

    @property
    def attn_offset(self) -> int:
        """Return where AttnParams begins in the argument, in bytes."""
        return 0

    def pointer_fields(self, name: str) -> tuple[str, ...]:
        """Return the fields of the argument that hold a tensor's address; the name is its field in
        AttnParams."""
        return (name,)

    # Tuning

    def least_rows(self, plan: P) -> int:
        """Return what a plan's rows are a multiple of."""
        return self.rows_of_warp

    def is_legal(self, plan: P) -> bool:
        """Return whether a plan fits the GPU: shared memory, threads and registers."""
        sizes = (plan.block_m, plan.block_n, plan.num_stages, plan.min_blocks)
        if min(sizes) < 1 or plan.block_m % self.least_rows(plan) or plan.block_n % 16:
            return False
        if plan.smem_bytes > smem_limits(plan.arch)[0] or plan.num_threads > 1024:
            return False
        return plan.min_blocks * plan.num_threads * 24 <= _REGISTERS_PER_BLOCK
