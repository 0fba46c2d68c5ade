"""Hold what a launch needs beside its tensors."""

from __future__ import annotations

import math

import torch

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import forward_of
from flashcore.launch.allocation import allocator
from flashcore.launch.counters import work_counters
from flashcore.problem import Problem


class Scratch:
    """Hold what a call needs beside its tensors, see ForwardKernel.scratch_shapes."""

    def __init__(self, problem: Problem, plan: Plan, device: torch.device) -> None:
        shapes = forward_of(plan).scratch_shapes(problem, plan)
        (self.num_counters,) = shapes.get("tile_counter", (0,))
        self.num_out = math.prod(shapes.get("split_out", (0,)))
        self.num_floats = self.num_out + math.prod(shapes.get("split_stats", (0,)))
        self._new_shares = allocator(device, (self.num_floats,), torch.float32)
        self._device = device

    def allocate(self) -> tuple[torch.Tensor, int]:
        """Allocate shares, from torch's allocator, and the address of counters; both of the current
        stream. Where blocks share the keys of row tiles. The GPU must be the current one."""
        return self._new_shares(), work_counters(self._device, self.num_counters)

    def pointers(self, shares: int, counters: int) -> dict[str, int]:
        """Return addresses by field of AttnParams."""
        stats = shares + 4 * self.num_out
        return {"split_out": shares, "split_stats": stats, "tile_counter": counters}
