"""Search for the best plan: sizes of tiles first, then schedules around the fastest, then a final
in turns.

A full product would be a thousand compilations for each class of problems. Sizes decide most, and
the other choices hardly change which sizes are good (docs/ladder.md). The first rounds time plans
briefly and unchecked; results are checked where a plan reaches the final.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flashcore.bench.workloads import Workload
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.selection.space import schedules, tiles
from flashcore.selection.tile_table import WORTH
from flashcore.tune.timing import Outcome, Timer

Plans = Callable[[Plan], Sequence[Plan]]
Compile = Callable[[Sequence[Plan]], Iterable[tuple[Plan, "str | None"]]]
OnStep = Callable[[str, int, int], None]

_EXPLORED = 2  # of the fastest sizes, how many get other schedules
_FINALISTS = 3
ODD = 1.25


@dataclass(frozen=True, slots=True)
class Found:
    """Found is the result for one workload.

    Args:
        workload: what was timed.
        default: the plan without tuning.
        winner: the fastest plan; `default` unless another is faster by 2 %.
        default_seconds: of a call, in the final.
        seconds: of a call with the winner, in the final.
        finalists: the plans of the final with their seconds, `default` first.
        timed: how many plans were timed.
        discarded: the others, with the reason.
        ranking: all that were timed, fastest first, by their first timing.
    """

    workload: Workload
    default: Plan
    winner: Plan
    default_seconds: float
    seconds: float
    finalists: tuple[tuple[Plan, float], ...]
    timed: int
    discarded: tuple[tuple[Plan, str], ...]
    ranking: tuple[tuple[Plan, float], ...]

    @property
    def gain(self) -> float:
        """Return the default's time over the winner's."""
        return self.default_seconds / self.seconds


class DefaultFailedError(RuntimeError):
    """The plan without tuning could not be timed, so there is nothing to compare with."""


class Search:
    """A Search is one search for the best plan of a workload.

    Args:
        workload: what to tune for.
        default: the plan without tuning.
        compile_plans: which of some plans are ruled out.
        timer: times and checks plans.
        on_step: called with what is under way, how many of its plans are done, and how many there
            are.
        sizes: what to try first.
        variants: what to try then, around the fastest.
    """

    def __init__(
        self,
        workload: Workload,
        default: Plan,
        compile_plans: Compile,
        timer: Timer,
        on_step: OnStep = lambda what, done, total: None,
        *,
        sizes: Plans = tiles,
        variants: Plans = schedules,
    ) -> None:
        self.workload = workload
        self.default = default
        self.compile_plans = compile_plans
        self.timer = timer
        self.on_step = on_step
        self.sizes = sizes
        self.variants = variants
        self.outcomes: dict[Plan, Outcome] = {}

    def run(self) -> Found:
        """Search. Raises DefaultFailedError."""
        self._try([self.default])
        if isinstance(failure := self.outcomes[self.default], str):
            raise DefaultFailedError(f"{self.workload.name}: {self.default.describe()}: {failure}")
        self._try(self.sizes(self.default))
        for plan, _ in self._ranking()[:_EXPLORED]:
            self._try(self.variants(plan))
        finalists = self._final()
        (_, default_seconds), *others = finalists
        winner, seconds = min(others, key=lambda entry: entry[1], default=finalists[0])
        if seconds > WORTH * default_seconds:
            winner, seconds = finalists[0]
        ranking = self._ranking()
        reasons = [(plan, text) for plan, text in self.outcomes.items() if isinstance(text, str)]
        return Found(
            self.workload,
            self.default,
            winner,
            default_seconds,
            seconds,
            tuple(finalists),
            len(ranking),
            tuple(reasons),
            tuple(ranking),
        )

    def _ranking(self) -> list[tuple[Plan, float]]:
        timed = [(plan, time) for plan, time in self.outcomes.items() if not isinstance(time, str)]
        return sorted(timed, key=lambda entry: entry[1])

    def _try(self, plans: Sequence[Plan]) -> None:
        """Compile and time those that were not tried yet."""
        new = [plan for plan in plans if plan not in self.outcomes]
        allowed = []
        for done, (plan, reason) in enumerate(self.compile_plans(new), 1):
            self.on_step("compiling", done, len(new))
            if reason is None:
                allowed.append(plan)
            else:
                self.outcomes[plan] = reason
        for done, plan in enumerate(allowed, 1):
            self.outcomes[plan] = self.timer.quick(self.workload, plan)
            self.on_step("timing", done, len(allowed))

    def _final(self) -> list[tuple[Plan, float]]:
        """Time the default and the fastest that are right, with their times in turns, so that
        clocks drift for all alike."""
        finalists = [self.default]
        for plan, _ in self._ranking():
            if len(finalists) > _FINALISTS:
                break
            if plan == self.default:
                continue
            reason = self._against_other_dtype(plan) or self.timer.check(self.workload, plan)
            if reason is None:
                finalists.append(plan)
            else:
                self.outcomes[plan] = reason
        times = self.timer.in_turns(self.workload, finalists)
        if any(self._is_odd(plan, time) for plan, time in zip(finalists, times, strict=True)):
            times = self.timer.in_turns(self.workload, finalists)
        if isinstance(times[0], str):
            raise DefaultFailedError(f"{self.workload.name}: final: {times[0]}")
        return [
            (plan, time)
            for plan, time in zip(finalists, times, strict=True)
            if not isinstance(time, str)
        ]

    def _is_odd(self, plan: Plan, time: Outcome) -> bool:
        """Return whether a time is so far above the plan's brief one that the GPU was held up: seen
        on one cell in a hundred, where a card was at its power limit."""
        brief = self.outcomes[plan]
        return isinstance(time, float) and isinstance(brief, float) and time > ODD * brief

    def _against_other_dtype(self, plan: Plan) -> str | None:
        """Return why the plan is ruled out in the other dtype: what is found serves float16 and
        bfloat16, so neither may be."""
        if plan.arch < 80:  # has no bfloat16
            return None
        ((_, reason),) = self.compile_plans([in_other_dtype(plan)])
        return reason


def in_other_dtype(plan: Plan) -> Plan:
    """Return the bfloat16 plan of a float16 one, and the other way round."""
    other = "float16" if plan.dtype == "bfloat16" else "bfloat16"
    return dataclasses.replace(plan, dtype=other)
