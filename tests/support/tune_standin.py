"""Provide stand-ins for what `flashcore tune` asks: a timer without a GPU, a compiler without
NVRTC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flashcore.bench.workloads import Workload
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.tune import timing


class FakeTimer:
    """Time by a formula; `broken` maps a tile's size to why it is not timed, `wrong` to what is
    wrong with its results."""

    def __init__(
        self,
        *,
        gain: float = 0.5,
        schedule: float = 0.9,
        broken: dict[tuple[int, int], str] | None = None,
        wrong: dict[tuple[int, int], str] | None = None,
    ) -> None:
        self.gain = gain
        self.schedule = schedule
        self.broken = broken or {}
        self.wrong = wrong or {}
        self.asked: list[Plan] = []
        self.finals: list[list[Plan]] = []

    def __enter__(self) -> FakeTimer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def quick(self, workload: Workload, plan: Plan) -> timing.Outcome:
        self.asked.append(plan)
        return self.broken.get((plan.block_m, plan.block_n)) or self.time(plan)

    def check(self, workload: Workload, plan: Plan) -> str | None:
        return self.wrong.get((plan.block_m, plan.block_n))

    def in_turns(self, workload: Workload, plans: Sequence[Plan]) -> list[timing.Outcome]:
        self.finals.append(list(plans))
        return [self.time(plan) for plan in plans]

    def time(self, plan: Plan) -> float:
        fast = plan.block_n == 96 and plan.block_m == 128
        schedule = self.schedule if fast and plan.num_stages == 3 else 1.0
        return 1e-3 * (self.gain if fast else 1.0) * schedule


class FakeCompiler:
    """Rule out by `reasons`, a tile's size and a dtype at a time."""

    def __init__(self, reasons: dict[tuple[int, int, str], str] | None = None) -> None:
        self.reasons = reasons or {}

    def __enter__(self) -> FakeCompiler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, plans: Sequence[Plan]) -> Iterator[tuple[Plan, str | None]]:
        for plan in plans:
            yield plan, self.reasons.get((plan.block_m, plan.block_n, plan.dtype))
