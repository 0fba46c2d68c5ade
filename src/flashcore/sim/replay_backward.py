"""Replay a simulated run of a backward kernel.

The words are those of replay.py. Inputs come from the file that the failing run saved, which also
says how tensors lay in memory; without it there is no out and lse to go on from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashcore.compile.plant import Plant
from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
from flashcore.problem import Problem
from flashcore.sim.placing import place
from flashcore.sim.replay_command import LAYOUT
from flashcore.sim.report import SimReport
from flashcore.sim.run_bwd import simulate_backward


@dataclass(frozen=True, slots=True)
class BackwardReplay:
    """A replay is a run of a backward kernel to repeat, with its tensors by name."""

    problem: Problem
    plan: BwdSm90Plan
    seed: int
    plant: Plant | None
    tensors: dict[str, Tensor]
    inputs_are_saved: bool = True

    def run(self) -> SimReport:
        """Run it. Raises SimulationError as the first run did."""
        return simulate_backward(
            self.problem, self.plan, self.tensors, seed=self.seed, plant=self.plant
        )


def load_replay(
    problem: Problem, plan: BwdSm90Plan, seed: int, plant: Plant | None, path: str
) -> BackwardReplay:
    """Return the run of a backward kernel, with its saved tensors as they lay in memory.

    Raises:
        ValueError: the file is not there.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"inputs={path!r} is no file: a backward kernel is replayed on the out, lse and "
            "gradients that the failing run saved. Run `flashcore verify --backward` or "
            "`flashcore isolate --backward` again"
        )
    values = torch.load(path, weights_only=True)
    tensors = {}
    for name in values:
        if name + LAYOUT not in values:
            continue
        dims, *rest, offset = values[name + LAYOUT].flatten().tolist()
        shape, strides = rest[:dims], rest[dims:]
        front = 4 - dims
        sizes, steps = (*(1,) * front, *shape), (*(0,) * front, *strides)
        placed = place(values[name], sizes, steps, offset)
        tensors[name] = placed[(0,) * front]
    return BackwardReplay(problem, plan, seed, plant, tensors)
