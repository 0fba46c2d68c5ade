"""Run a kernel that has no bug once for many planted bugs of the kernels behind it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
from flashcore.problem import Problem
from flashcore.sim.run_bwd import simulate_backward


class HealthyRuns:
    """They are remembered by what they wrote, for each key: that is the same with every seed."""

    def __init__(self) -> None:
        self._written: dict[Hashable, dict[str, Tensor]] = {}

    def simulate(
        self,
        key: Hashable,
        problem: Problem,
        plan: BwdSm90Plan,
        tensors: Mapping[str, Tensor],
        seed: int,
    ) -> None:
        """Run a kernel of the backward without a bug, or write what it wrote."""
        if key not in self._written:
            simulate_backward(problem, plan, tensors, seed=seed)
            self._written[key] = {name: tensors[name].clone() for name in plan.written}
        for name, written in self._written[key].items():
            tensors[name].copy_(written)
