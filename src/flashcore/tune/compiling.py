"""Compiles many configurations at once, and says which of them the compiler rules out."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from flashcore.errors import CompileError
from flashcore.jit import Resources, resources
from flashcore.machine import available_cores
from flashcore.plan import Plan
from flashcore.tune.space import registers_asked_for

_MAX_WORKERS = 16
_FEW = 4  # compile faster than a worker starts, which imports torch


class Compiler:
    """A pool of processes, as NVRTC compiles one program at a time in a process. They start with
    the first call that has many plans, and end with the `with` block."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = min(_MAX_WORKERS, available_cores()) if workers is None else workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __call__(self, plans: Sequence[Plan]) -> Iterator[tuple[Plan, str | None]]:
        """Each plan, in any order, and why it is ruled out or None."""
        if self.workers < 2 or len(plans) <= _FEW:
            yield from ((plan, obstacle(plan)) for plan in plans)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                max_workers=self.workers,
                mp_context=multiprocessing.get_context("spawn"),  # CUDA does not survive a fork
                initializer=ignore_interrupts,
            )
        futures = {self._pool.submit(obstacle, plan): plan for plan in plans}
        for future in as_completed(futures):
            yield futures[future], future.result()


def ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; only the parent decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def obstacle(plan: Plan) -> str | None:
    """Compiles a plan, or finds it compiled. Why it must or should not run, or None."""
    try:
        return rejection(plan, resources(plan))
    except CompileError as error:
        return f"does not compile: {str(error).splitlines()[0]}"


def rejection(plan: Plan, found: Resources) -> str | None:
    """What the compiler's report has against a plan, or None."""
    if found.spill_bytes > 0:
        return f"spills {found.spill_bytes} bytes"
    if found.remarks:
        return found.remarks[0]
    given = found.registers * plan.num_threads
    if found.registers >= 0 and registers_asked_for(plan) > given:
        return f"its roles ask for {registers_asked_for(plan)} registers of {given}: would hang"
    return None
