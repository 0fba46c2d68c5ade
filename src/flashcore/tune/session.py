"""Run many searches one after the other, with one compiler and one timer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from flashcore.bench.workloads import Workload
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection.space import schedules, tiles
from flashcore.tune.defaults import default_backward_plans, default_plan
from flashcore.tune.keeping import Keeper
from flashcore.tune.search import Compile, DefaultFailedError, Found, Search, in_other_dtype
from flashcore.tune.shortlist import shortlist
from flashcore.tune.timing import Timer

Task = tuple[Workload, Problem, Plan]
# Steps done (0: the step goes on) and what is under way.
OnProgress = Callable[[int, str], None]


@dataclass
class Session:
    """A session holds what is searched for, and what was found so far.

    Args:
        tasks: workloads with what they run without tuning.
        keeper: gets each result at once.
        compile_plans: see Search.
        timer: see Search.
        brief: try a short list of tiles, all compiled before the first is timed; else all that is
            legal, and compile as the search goes on.
        minutes: no search starts later than this after `run` was called; None: no limit.
    """

    tasks: Sequence[Task]
    keeper: Keeper
    compile_plans: Compile
    timer: Timer
    brief: bool = False
    minutes: float | None = None
    found: list[Found] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: int = 0
    compile_seconds: float = 0.0
    search_seconds: float = 0.0

    def run(self, on_progress: OnProgress = lambda steps, text: None) -> None:
        """Search until all is done. An interruption leaves `found` as far as it came."""
        start = time.monotonic()
        if self.brief:
            self._compile_all(on_progress)
            self.compile_seconds = time.monotonic() - start
        for number, task in enumerate(self.tasks):
            elapsed = time.monotonic() - start
            if self.minutes is not None and elapsed > 60.0 * self.minutes:
                self.left_out = len(self.tasks) - number
                return
            self._search(task, on_progress)
            self.search_seconds = time.monotonic() - start - self.compile_seconds

    def _search(self, task: Task, on_progress: OnProgress) -> None:
        workload, problem, default = task
        search = Search(
            workload,
            default,
            self.compile_plans,
            self.timer,
            lambda what, done, total: on_progress(0, f"{workload.name}: {what} {done}/{total}"),
            sizes=shortlist if self.brief else tiles,
            variants=(lambda plan: []) if self.brief else schedules,
        )
        try:
            result = search.run()
        except DefaultFailedError as error:
            self.failures.append(str(error))
        else:
            self.found.append(result)
            self.keeper.keep(problem, result)
        on_progress(1, workload.name)

    def _compile_all(self, on_progress: OnProgress) -> None:
        plans: dict[Plan, None] = {}
        for _, _, default in self.tasks:
            for plan in shortlist(default):
                plans[plan] = None
                if plan.arch >= 80:
                    plans[in_other_dtype(plan)] = None
        for done, _ in enumerate(self.compile_plans(list(plans)), 1):
            on_progress(0, f"compiling {done}/{len(plans)}")


def tasks_for(
    workloads: Iterable[Workload], backend: str, arch: int, keeper: Keeper, *, shipped: bool,
    backward: bool = False,
) -> list[Task]:  # fmt: skip
    """Return the workloads with their plans, of the `backward` pass those of each kernel. Of those
    that a keeper does not tell apart the first one.

    Raises:
        BackendUnavailableError, NotImplementedError, TypeError: see default_plan.
    """
    tasks: dict[tuple[str, str], Task] = {}
    for workload in workloads:
        plans: Sequence[Plan]
        if backward:
            problem, plans = default_backward_plans(workload, arch)
        else:
            problem, default = default_plan(workload, backend, arch, shipped=shipped)
            plans = [default]
        for plan in plans:
            key = plan.kernel, keeper.key(problem, plan)
            tasks.setdefault(key, (workload, problem, plan))
    return list(tasks.values())
