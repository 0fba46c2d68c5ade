"""Hold the results of `gates.isolate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashcore.checks.paged_cases import PagedCase
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.isolate.alarms import Alarm
from flashcore.isolate.locate import Check
from flashcore.problem.case import Case


@dataclass(frozen=True, slots=True)
class StageResult:
    """A result holds what came out of one stage. `status` is "ok", "wrong" (values), "alarm" (the
    simulator or the GPU stopped the kernel), "not compiled" (the compiler rejects the kernel's
    source) or "not run"."""

    stage: str
    title: str
    plan: str
    status: str
    checks: tuple[Check, ...] = ()
    alarm: Alarm | None = None
    hints: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Return True unless a value is wrong, the run was stopped, or there was none."""
        return self.status in ("ok", "not run")

    def first_bad_check(self) -> Check | None:
        """Return the first check that failed, if any."""
        return next((check for check in self.checks if not check.ok), None)


@dataclass(frozen=True, slots=True)
class Isolation:
    """An isolation is the result of `isolate`.

    `tile` has the fields of the plan that were asked for. `first_wrong` names the first wrong stage
    (or, where an alarm came from outside the stages, "setup", "schedule", "load" or "store"; where
    the kernel does not compile, "compile"), None when all are right; `why` gives the reasons.
    """

    case: Case | VarlenCase | PagedCase
    backend: str
    kernel: str
    seed: int
    plant: str | None
    tile: Mapping[str, Any]
    first_wrong: str | None
    why: tuple[str, ...]
    stages: tuple[StageResult, ...]

    @property
    def ok(self) -> bool:
        """Return True when every stage is right."""
        return self.first_wrong is None
