"""Check what holds for every planted bug, and run the kernels before it once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from flashcore.compile.codegen import KERNELS_DIR
from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
from flashcore.problem import Problem
from flashcore.sim import Plant
from flashcore.sim.report import ALARM_KINDS
from flashcore.sim.run_bwd import simulate_backward

_PAGE = Path(__file__).parents[2] / "docs" / "planted-bugs.md"
SEEDS = range(20)
SOME_SEEDS = SEEDS[::4]
_FOUND_AT_THE_END = {"wrong-result", "unwritten-output", "counter-left"}


def seeds_of(plant: Plant) -> range:
    """Return the seeds that must find a plant.

    Whether an alarm is raised may depend on the schedule, and a run ends with it. A run that comes
    to its end is a whole run without a race, and what it wrote is the same with every schedule: a
    few of them show a bug that nothing but this tells of.
    """
    return SOME_SEEDS if {plant.caught_by, *plant.or_by} <= _FOUND_AT_THE_END else SEEDS


def check_text(name: str, plant: Plant) -> None:
    """Check that a plant changes one place, moves no line, and is caught by what there is."""
    assert plant.name == name
    assert {plant.caught_by, *plant.or_by} <= {*ALARM_KINDS, "wrong-result"}
    assert plant.find.count("\n") == plant.replace.count("\n")
    assert (KERNELS_DIR / plant.file).read_text(encoding="utf-8").count(plant.find) == 1


def undocumented(names: Iterable[str], page: Path = _PAGE) -> list[str]:
    """Return those plants that docs/planted-bugs.md, or another page, does not list."""
    text = page.read_text(encoding="utf-8")
    return [name for name in names if f"`{name}`" not in text]


class HealthyRuns:
    """Run a kernel that has no bug once, for many planted bugs of the kernels behind it.

    Runs are remembered by what they wrote, for each key: that is the same with every seed.
    """

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
            names = *plan.written, "delta_count"
            self._written[key] = {x: tensors[x].clone() for x in names if x in tensors}
        for name, written in self._written[key].items():
            tensors[name].copy_(written)
