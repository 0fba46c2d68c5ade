"""The search: sizes of tiles first, then schedules around the fastest, then a final in turns.

A full product would be a thousand compilations for each class of problems. Sizes decide most, and
the other choices hardly change which sizes are good (docs/performance.md, "What was tried").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flashcore.bench.workloads import Workload
from flashcore.plan import Plan
from flashcore.tune.space import schedules, tiles
from flashcore.tune.timing import Outcome, Timer

Compile = Callable[[Sequence[Plan]], Iterable[tuple[Plan, "str | None"]]]
OnStep = Callable[[str, int, int], None]

_EXPLORED = 2  # of the fastest sizes, how many get other schedules
_FINALISTS = 3
# A winner must be faster by more than times differ from run to run on one machine.
WORTH = 0.98


@dataclass(frozen=True, slots=True)
class Found:
    """The result for one workload.

    Args:
        workload: what was timed.
        default: the plan of the tables.
        winner: the fastest plan; `default` unless another is faster by 2 %.
        default_seconds: of a call, in the final.
        seconds: of a call with the winner, in the final.
        timed: how many plans were timed.
        discarded: the others, with the reason.
        ranking: all that were timed, fastest first, by their first timing.
    """

    workload: Workload
    default: Plan
    winner: Plan
    default_seconds: float
    seconds: float
    timed: int
    discarded: tuple[tuple[Plan, str], ...]
    ranking: tuple[tuple[Plan, float], ...]


class DefaultFailedError(RuntimeError):
    """The plan of the tables itself could not be timed, so there is nothing to compare with."""


class Search:
    """One search for the best plan of a workload.

    Args:
        workload: what to tune for.
        default: the plan of the tables.
        compile_plans: which of some plans are ruled out.
        timer: times plans.
        on_step: called with what is under way, how many of its plans are done, and how many there
            are.
    """

    def __init__(
        self,
        workload: Workload,
        default: Plan,
        compile_plans: Compile,
        timer: Timer,
        on_step: OnStep = lambda what, done, total: None,
    ) -> None:
        self.workload = workload
        self.default = default
        self.compile_plans = compile_plans
        self.timer = timer
        self.on_step = on_step
        self.outcomes: dict[Plan, Outcome] = {}

    def run(self) -> Found:
        """Search. Raises DefaultFailedError."""
        self._try([self.default])
        if isinstance(failure := self.outcomes[self.default], str):
            raise DefaultFailedError(f"{self.workload.name}: {self.default.describe()}: {failure}")
        self._try(tiles(self.default))
        for plan, _ in self._ranking()[:_EXPLORED]:
            self._try(schedules(plan))
        winner, seconds, default_seconds = self._final()
        ranking = self._ranking()
        reasons = [(plan, text) for plan, text in self.outcomes.items() if isinstance(text, str)]
        return Found(
            self.workload,
            self.default,
            winner,
            default_seconds,
            seconds,
            len(ranking),
            tuple(reasons),
            tuple(ranking),
        )

    def _ranking(self) -> list[tuple[Plan, float]]:
        timed = [(plan, time) for plan, time in self.outcomes.items() if not isinstance(time, str)]
        return sorted(timed, key=lambda entry: entry[1])

    def _try(self, plans: Sequence[Plan]) -> None:
        """Compile, check and time those that were not tried yet."""
        new = [plan for plan in plans if plan not in self.outcomes]
        allowed = []
        for done, (plan, reason) in enumerate(self.compile_plans(new), 1):
            self.on_step("compiling", done, len(new))
            if reason is None:
                allowed.append(plan)
            else:
                self.outcomes[plan] = reason
        for done, plan in enumerate(allowed, 1):
            (self.outcomes[plan],) = self.timer(self.workload, [plan])
            self.on_step("timing", done, len(allowed))

    def _final(self) -> tuple[Plan, float, float]:
        """Winner, its time, the default's: the fastest and the default in turns, so that clocks
        drift for all alike."""
        best = [plan for plan, _ in self._ranking() if plan != self.default]
        finalists = [plan for plan in best[:_FINALISTS] if self._serves_other_dtype(plan)]
        times = self.timer(self.workload, [self.default, *finalists])
        default_seconds = times[0]
        if isinstance(default_seconds, str):
            raise DefaultFailedError(f"{self.workload.name}: final: {default_seconds}")
        winner, seconds = self.default, default_seconds
        for plan, time in zip(finalists, times[1:], strict=True):
            if not isinstance(time, str) and time < min(seconds, WORTH * default_seconds):
                winner, seconds = plan, time
        return winner, seconds, default_seconds

    def _serves_other_dtype(self, plan: Plan) -> bool:
        """An entry serves float16 and bfloat16, so neither may be ruled out."""
        if plan.arch < 80:  # has no bfloat16
            return True
        other = "float16" if plan.dtype == "bfloat16" else "bfloat16"
        ((_, reason),) = self.compile_plans([dataclasses.replace(plan, dtype=other)])
        return reason is None
