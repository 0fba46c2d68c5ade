"""Keep the tile configurations that `flashcore tune` found on this machine's GPU, and their file.

The file lies in the cache directory, one for an architecture: `tuned-sm_90.json`. An entry serves
one GPU model, one version of the kernel's source, and one class of problems: the options, and
lengths and heads rounded to powers of two. Anything else goes by the table that ships
(selection/tile_table.py), or by the rules in kernels/fwd_wmma/plan.py and
kernels/fwd_sm90/tiles.py. An entry can only choose among legal plans of a kernel that serves the
problem anyway, so a wrong one costs time, never a result.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from flashcore.base import env
from flashcore.compile.codegen import flatten, kernel_file
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.kernel import Tile
from flashcore.kernels.registry import kernel_of
from flashcore.problem import Problem
from flashcore.selection import tile_table
from flashcore.selection.space import with_tile

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry holds what was found for one class of problems.

    Args:
        gpu: the GPU's name.
        kernel: the kernel's name.
        version: `kernel_version` of the kernel that was timed.
        problem_class: see `problem_class`.
        tile: the fields of the Plan that were chosen.
        seconds: a call's time with it.
        default_seconds: a call's time with the plan that it replaces.
        measured_on: the shape that was timed.
        date: of the measurement, ISO.
    """

    gpu: str
    kernel: str
    version: str
    problem_class: str
    tile: Tile
    seconds: float
    default_seconds: float
    measured_on: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return what no two entries of a file share."""
        return self.gpu, self.kernel, self.version, self.problem_class


def problem_class(problem: Problem) -> str:
    """Return the class of problems that one entry serves: the same head_dims and options; lengths,
    and heads times batch, that round to the same powers of two. float16 and bfloat16 are alike."""
    dims = f"D{problem.head_dim}"
    if problem.head_dim_v != problem.head_dim:
        dims += f"/{problem.head_dim_v}"
    parts = [dims, *tile_table.options_of(problem)]
    heads = problem.batch * problem.num_heads_q
    sizes = (("heads", heads), ("q", problem.seqlen_q), ("k", problem.seqlen_k))
    return " ".join(parts + [f"{name}{_power_of_two(size)}" for name, size in sizes])


def class_of(problem: Problem, plan: Plan) -> str:
    """Return the class of problems that an entry of such plans serves."""
    return " ".join([problem_class(problem), *kernel_of(plan).variant_of(plan).split()])


def _power_of_two(size: int) -> int:
    """Return the nearest power of two, by ratio."""
    return 0 if size < 1 else int(2 ** round(math.log2(size)))


@functools.cache
def kernel_version(kernel: str) -> str:
    """Return hash of a kernel's source text, without a plan's constants and without comments."""
    lines = (
        line.partition("//")[0].strip() for line in flatten(kernel_file(kernel), "ptx").splitlines()
    )
    code = "\n".join(line for line in lines if line and not line.startswith("#line"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def gpu_name() -> str | None:
    """Return the current GPU's name, or None."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def gpu_arch() -> int:
    """Return the current GPU's architecture, 90 for sm_90; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def path_for(arch: int) -> Path:
    """Return the file for an architecture, 90 for sm_90; it need not exist."""
    return env.cache_dir() / f"tuned-sm_{arch}.json"


@functools.lru_cache(maxsize=64)
def _path_for(arch: int, cache_dir: str | None) -> Path:
    """Return `path_for`, which reads this variable; of others, what they were at first."""
    return path_for(arch)


def read(path: Path) -> list[Entry]:
    """Return the entries of a file; none where there is no file, and none with a RuntimeWarning
    where it cannot be understood."""
    try:
        modified_ns = os.stat(path).st_mtime_ns
    except OSError:
        return []
    return list(_read(path, modified_ns))


@functools.lru_cache(maxsize=16)
def _read(path: Path, modified_ns: int) -> tuple[Entry, ...]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != _SCHEMA:
            raise ValueError(f"schema {document['schema']!r} instead of {_SCHEMA}")
        return tuple(_entry(row) for row in document["entries"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is ignored, as it was not written by this version of `flashcore tune` "
            f"({type(error).__name__}: {error}); run that again, or remove the file",
            RuntimeWarning,
            stacklevel=4,
        )
        return ()


def _entry(row: dict[str, Any]) -> Entry:
    entry = Entry(**row)
    for field in fields(Entry):
        value = getattr(entry, field.name)
        wanted = {"str": str, "float": float, "Tile": dict}[str(field.type)]
        if not isinstance(value, wanted):
            raise ValueError(f"{field.name} is {value!r}")
    return entry


def save(path: Path, entries: Iterable[Entry], dropped: Iterable[Entry] = ()) -> None:
    """Add entries to a file, in place of those with the same key. A process that reads meanwhile
    sees the old file or the new one.

    Args:
        path: the file.
        entries: to add.
        dropped: to remove, by their key.

    Raises:
        OSError: the folder cannot be written.
    """
    merged = {entry.key: entry for entry in read(path)}
    for entry in dropped:
        merged.pop(entry.key, None)
    merged |= {entry.key: entry for entry in entries}
    rows = [asdict(merged[key]) for key in sorted(merged)]
    text = json.dumps({"schema": _SCHEMA, "entries": rows}, indent=1)
    tile_table.replace_text(path, text + "\n")
    _read.cache_clear()  # a file system's clock may be too coarse to tell


@dataclass(frozen=True, slots=True)
class Found:
    """Found is a plan that was measured, and a sentence on where."""

    plan: Plan
    source: str


def find(problem: Problem, plan: Plan) -> Found | None:
    """Return what was measured for a problem: on this machine's GPU, or else for the table that
    ships.

    Args:
        problem: what is asked.
        plan: what the rules say.

    Returns:
        The plan with the measured tile; None where nothing was measured for it, or with a debug
        gate. See FLASHCORE_TUNED.
    """
    if plan.gate is not None:
        return None
    own = _find_own(problem, plan)
    if own is None and kernel_of(plan).is_backward:  # no table of theirs ships
        return None
    if own is not None:
        changed, entry = own
        return Found(
            changed,
            f"tiles were found by `flashcore tune` on {entry.gpu}, {entry.date[:10]}, with "
            f"{entry.measured_on}; FLASHCORE_TUNED=0 goes by what ships with flashcore",
        )
    shipped = tile_table.find(problem, plan)
    if shipped is None:
        return None
    about, cell = shipped.table.about, shipped.cell
    source = (
        f"tiles come from the table that ships with flashcore, measured on {about['gpu']['name']}, "
        f"{about['date'][:10]}, with {cell.workload}; FLASHCORE_TUNED=rules goes by the rules"
    )
    if about["kernels"].get(plan.kernel) != kernel_version(plan.kernel):
        source += "; the kernel has changed since then"
    return Found(shipped.plan, source)


def _find_own(problem: Problem, plan: Plan) -> tuple[Plan, Entry] | None:
    """Return what `flashcore tune` found on this GPU, with this version of the kernel; for CUDA
    tensors, as nothing is tuned for others."""
    if problem.device != "cuda" or plan.arch != problem.arch or not env.tuned():
        return None
    # Asked for each new shape: a path costs more to make than a look whether there is a file.
    entries = read(_path_for(plan.arch, os.environ.get(env.CACHE_DIR.name)))
    if not entries:
        return None
    key = (gpu_name(), plan.kernel, kernel_version(plan.kernel), class_of(problem, plan))
    for entry in entries:
        if entry.key == key:
            changed = with_tile(plan, entry.tile)
            return None if changed is None else (changed, entry)
    return None
