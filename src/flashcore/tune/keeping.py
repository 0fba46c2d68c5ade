"""Keep winners: into the user's cache, from which they are used from then on, or into a table of
the kind that ships."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from flashcore.base import machine
from flashcore.bench.document import command_line
from flashcore.errors import FlashCoreError
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection import tile_table, tuned
from flashcore.selection.space import tile_of
from flashcore.tune.grid import table_of
from flashcore.tune.search import Found


class Keeper(Protocol):
    """Keep what was found, as it is found."""

    def key(self, problem: Problem, plan: Plan) -> str:
        """Return what no two results share: of such problems and plans only one is searched
        for."""

    def keep(self, problem: Problem, found: Found) -> None:
        """Write a result. Raises FlashCoreError where that is not possible."""


class CacheKeeper:
    """Keep winners in the user's cache; where none was found, an earlier one goes."""

    def __init__(self, gpu: str, arch: int) -> None:
        self.gpu = gpu
        self.path = tuned.path_for(arch)

    def key(self, problem: Problem, plan: Plan) -> str:
        """Return the key of a task: see Keeper."""
        return tuned.class_of(problem, plan)

    def keep(self, problem: Problem, found: Found) -> None:
        """Keep a result: see Keeper."""
        entry = tuned.Entry(
            gpu=self.gpu,
            kernel=found.winner.kernel,
            version=tuned.kernel_version(found.winner.kernel),
            problem_class=tuned.class_of(problem, found.winner),
            tile=tile_of(found.winner),
            seconds=found.seconds,
            default_seconds=found.default_seconds,
            measured_on=f"{found.workload.name} {found.workload.dtype}",
            date=machine.now(),
        )
        won = found.winner != found.default
        try:
            tuned.save(self.path, [entry] if won else [], dropped=[] if won else [entry])
        except OSError as error:
            raise FlashCoreError(
                f"{self.path} cannot be written ({error}); set FLASHCORE_CACHE_DIR to a writable "
                "folder, or give another file with --output"
            ) from error


class TableKeeper:
    """Write a table of the kind that ships, anew with each result."""

    def __init__(self, path: Path) -> None:
        gpu = machine.gpu()
        assert gpu is not None  # nothing could be timed
        self.path = path
        self.about: dict[str, Any] = {
            "gpu": asdict(gpu),
            "date": machine.now(),
            "command": command_line(),
            "versions": machine.versions(),
            "kernels": {},
        }
        self.results: list[tuple[Problem, Found]] = []

    def key(self, problem: Problem, plan: Plan) -> str:
        """Return the key of a task: see Keeper."""
        return f"{tile_table.class_of(problem)} {tile_table.Size.of(problem)}"

    def keep(self, problem: Problem, found: Found) -> None:
        """Keep a result: see Keeper."""
        kernel = found.default.kernel
        self.about["kernels"][kernel] = tuned.kernel_version(kernel)
        self.results.append((problem, found))
        table = table_of(self.about, self.results)
        try:
            tile_table.replace_text(self.path, tile_table.to_json(table))
        except OSError as error:
            raise FlashCoreError(
                f"{self.path} cannot be written ({error}); give another file with --output"
            ) from error
