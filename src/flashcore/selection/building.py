"""Compile plans into a bundle, by several processes at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flashcore.compile import bundle, jit
from flashcore.compile.codegen import PROBE, generate_probe_source, generate_source
from flashcore.errors import CompileError
from flashcore.kernels.append.params import append_plans
from flashcore.kernels.fwd_wmma.plan import SUPPORTED_ARCHS, Plan
from flashcore.selection.compiling import Workers

# Of one kernel on one core; NVRTC 13.0 on a Xeon of 2023, for all kernels of a bundle of sm_90.
SECONDS_A_KERNEL = 0.85

# Source, architecture, entry point, suffix, label: the arguments of jit.compile_source.
Unit = tuple[str, int, str, str, str]


def units(plans: Iterable[Plan]) -> dict[str, Unit]:
    """Return what has to be compiled for plans, and for launching them, by key."""
    found: dict[str, Unit] = {}
    for plan in plans:
        for unit in (
            (generate_source(plan), plan.arch, plan.kernel, plan.arch_suffix, plan.describe()),
            (generate_probe_source(plan.dtype), plan.arch, PROBE, "", f"{PROBE} sm_{plan.arch}"),
        ):
            found.setdefault(jit.cache_key(unit[0], unit[1], unit[3]), unit)
    return found


def append_units(archs: Sequence[int], dtypes: Iterable[str]) -> dict[str, Unit]:
    """Return what has to be compiled to append to caches, by key."""
    found: dict[str, Unit] = {}
    for arch, plan in itertools.product(archs or SUPPORTED_ARCHS, append_plans(dtypes)):
        if plan.dtype == "bfloat16" and arch < 80:
            continue
        source = generate_source(plan)  # type: ignore[arg-type]
        label = f"{plan.describe()}, sm_{arch}"
        found[jit.cache_key(source, arch)] = (source, arch, plan.kernel, "", label)
    return found


def compile_unit(unit: Unit) -> bytes:
    """Compile one unit, or find it compiled, and return it as a bundle holds it."""
    return jit.pack(jit.compile_source(*unit))


def write_bundle(
    path: Path,
    wanted: dict[str, Unit],
    jobs: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> int:
    """Compile units into one file, for machines where nothing may be compiled.

    Args:
        path: the bundle to write; FLASHCORE_BUNDLE names it there.
        wanted: see `units`.
        jobs: processes that compile; by default one a core, at most 16.
        advance: called whenever one has been compiled.

    Returns:
        How many kernels the bundle holds.

    Raises:
        CompileError: one does not compile, or its process dies.
        OSError: the file cannot be written.
    """
    entries: dict[str, bytes] = {}
    key_of = {unit: key for key, unit in wanted.items()}
    with Workers(jobs) as workers:
        compiling = workers.map(compile_unit, list(key_of))
        while True:
            try:
                unit, entry = next(compiling)
            except StopIteration as end:
                lost = end.value
                break
            entries[key_of[unit]] = entry
            advance()
    if lost:
        raise CompileError(f"the compiler's process died over {lost[0][-1]}")
    return bundle.write(path, entries.items(), (unit[1] for unit in wanted.values()))
