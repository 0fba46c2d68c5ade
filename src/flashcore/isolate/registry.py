"""Give every planted bug the call that shows it, and the stage that is then the first wrong one.

The list of all bugs stands in sim/plants/index.py alone, their calls in plant_calls.py, and their
stages in plant_stages.py. `flashcore isolate --plant NAME` takes the call unless it is told another
one; tests/plants/test_planted_bugs.py holds isolate to the stages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashcore.checks.paged_cases import PagedCase
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.compile.plant import Plant
from flashcore.isolate import plant_calls
from flashcore.isolate.backward_calls import planted_case
from flashcore.isolate.plant_stages import STAGES
from flashcore.problem.case import Case
from flashcore.sim.plants import index


@dataclass(frozen=True, slots=True)
class Planted:
    """Planted describes a planted bug of a kernel.

    `options` are the fields of the Case that shows it (of a VarlenCase, where `is_packed`, of a
    PagedCase, where `is_paged`) as far as they are not isolate's defaults, `tile` those of its
    plan; `drawn` is the number of that case among those of `verify` with seed 0, if it is one.
    `stage` is the stage, or the phase outside of the stages, that isolate then names.
    """

    plant: Plant
    kernel: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tile: Mapping[str, Any] = field(default_factory=dict)
    is_packed: bool = False
    is_paged: bool = False
    drawn: int | None = None
    stage: str = ""

    @property
    def kind(self) -> str:
        """Return what the call that shows it is of, where that is no Case; else nothing."""
        return "packed sequences" if self.is_packed else "caches in pages" * self.is_paged

    def case(self, base: Case, given: Collection[str] = ()) -> Case | VarlenCase | PagedCase:
        """Return the call that shows the bug: `base` with `options`, except for fields that are
        `given`."""
        options = {name: value for name, value in self.options.items() if name not in given}
        if self.is_packed:
            return VarlenCase(**options)
        if self.is_paged:
            return PagedCase(**options)
        return planted_case(base, options)


def _planted(plant: Plant, kernel: str) -> Planted:
    fields = dict(plant_calls.DEFAULTS.get(kernel, {}))
    fields["tile"] = {**fields.get("tile", {}), **plant.plan}
    fields |= plant_calls.CALLS.get(kernel, {}).get(plant.name, {})
    by_stage = STAGES[kernel].items()
    stage = next((stage for stage, names in by_stage if plant.name in names), "")
    return Planted(plant, kernel, stage=stage, **fields)


def all_planted() -> tuple[Planted, ...]:
    """Return every planted bug of every kernel."""
    found = index.BY_KERNEL.items()
    return tuple(_planted(plant, kernel) for kernel, plants in found for plant in plants.values())


def find_plant(name: str, backend: str, kernel: str | None = None) -> Planted:
    """Return the planted bug of that name.

    Args:
        name: as `--plant` takes it.
        backend: must be "sim".
        kernel: it must be in; by default any.

    Raises:
        ValueError: an unknown name, a bug of another kernel, or a backend that is not the
            simulator.
    """
    index.check_backend(name, backend)
    kernel = kernel or index.kernels_of(name)[0]
    index.check_is_taken_apart(name, kernel)
    return _planted(index.find_plant(name, kernel), kernel)
