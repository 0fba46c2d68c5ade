"""Compile many configurations at once, and says which of them the compiler rules out."""

from __future__ import annotations

import functools
import multiprocessing
import re
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, TypeVar

from flashcore.base.machine import available_cores
from flashcore.compile.codegen import generate_source
from flashcore.compile.jit import Resources, cache_key, resources
from flashcore.errors import CompileError
from flashcore.kernels.fwd_wmma.plan import Plan

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.11

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_WORKERS = 16
_FEW = 4  # compile faster than a worker starts, which imports torch
_ATTEMPTS = 2  # a process that dies takes with it what others had to do


class Workers:
    """Workers are a pool of processes, as NVRTC compiles one program at a time in a process. They
    start with the first call that has many items, and end with the `with` block."""

    def __init__(self, count: int | None = None) -> None:
        self.count = min(_MAX_WORKERS, available_cores()) if count is None else count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Generator[tuple[Item, Result], None, list[Item]]:
        """Yield each item, in any order, and what the function makes of it.

        Returns:
            The items over which processes died.
        """
        if self.count < 2 or len(items) <= _FEW:
            yield from ((item, function(item)) for item in items)
            return []
        for _ in range(_ATTEMPTS):
            items = yield from self._map_in_pool(function, items)
        return list(items)

    def _map_in_pool(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Generator[tuple[Item, Result], None, list[Item]]:
        """Return those that a process died over, the others' in its queue among them."""
        if not items:
            return []
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                max_workers=self.count,
                mp_context=multiprocessing.get_context("spawn"),  # CUDA does not survive a fork
                initializer=ignore_interrupts,
            )
        futures = {self._pool.submit(function, item): item for item in items}
        lost = []
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenProcessPool):
                lost.append(futures[future])
            else:
                yield futures[future], future.result()
        if lost:
            self._pool = None  # it takes no more work
        return lost


class Compiler(Workers):
    """A Compiler is workers that compile plans. What was compiled once is remembered, by its
    source."""

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(workers)
        self._known: dict[str, str | None] = {}

    def __call__(self, plans: Sequence[Plan]) -> Iterator[tuple[Plan, str | None]]:
        """Yield each plan, in any order, and why it is ruled out or None."""
        alike: dict[str, list[Plan]] = {}
        for plan in plans:
            alike.setdefault(_source(plan), []).append(plan)
        new = {same[0]: source for source, same in alike.items() if source not in self._known}
        for source in alike.keys() - set(new.values()):
            yield from ((plan, self._known[source]) for plan in alike[source])
        for compiled, reason in self._compile(list(new)):
            source = new[compiled]
            self._known[source] = reason
            yield from ((plan, reason) for plan in alike[source])

    def _compile(self, plans: Sequence[Plan]) -> Iterator[tuple[Plan, str | None]]:
        lost = yield from self.map(obstacle, plans)
        yield from ((plan, "the compiler's process died") for plan in lost)


@functools.lru_cache(maxsize=4096)
def _source(plan: Plan) -> str:
    """Return the hash of a plan's source text: plans may differ in what only the host reads."""
    return cache_key(generate_source(plan), plan.arch, plan.arch_suffix)


def ignore_interrupts() -> None:
    """Ignore Ctrl-C, which reaches the whole process group; only the parent decides what it
    means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def obstacle(plan: Plan) -> str | None:
    """Compile a plan, or find it compiled; return why it must or should not run, or None. Why it
    must or should not run, or None."""
    try:
        return rejection(plan, resources(plan))
    except CompileError as error:
        lines = str(error).strip().splitlines()
        told = (line for line in lines if re.search(r"\b(error|fatal)\b", line))
        return f"does not compile: {next(told, lines[0]).strip()[:160]}"


def rejection(plan: Plan, found: Resources) -> str | None:
    """Return what the compiler's report has against a plan, or None."""
    if found.spill_bytes > 0:
        return f"spills {found.spill_bytes} bytes"
    if found.remarks:
        return found.remarks[0]
    given = found.registers * plan.num_threads
    if found.registers >= 0 and plan.registers_asked_for > given:
        return f"its roles ask for {plan.registers_asked_for} registers of {given}: would hang"
    return None
