"""Turn a Plan into one flattened translation unit, for NVRTC (`ptx`) or for the simulator (`host`).

A kernel file includes its headers by their path below `kernels/`; `@target` in such a path names
the side. Flattening replaces every include by the file's text once, keeps `#line` directives, so
that compilers and the simulator name the kernel's own lines, and resolves the gate directives

    //@if gate [NAME ...]     lines for the named debug gates, or for any gate
    //@else
    //@end

so that a source generated without a gate has no trace of one. The text that comes out is the whole
input of the compiler and therefore the cache key: nothing in it can be stale.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant
    from flashcore.kernels.fwd_wmma.plan import Plan

Target = Literal["ptx", "host"]

KERNELS_DIR = Path(__file__).parent.parent / "kernels"

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
_DIRECTIVE = re.compile(r"^\s*//@(\w+)\s*(.*)$")


@functools.cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _constant_lines(constants: Mapping[str, object]) -> list[str]:
    """Return `constexpr` definitions; a `str` value names a type (`using`)."""
    lines = []
    for name, value in constants.items():
        if isinstance(value, bool):
            lines.append(f"constexpr bool {name} = {str(value).lower()};")
        elif isinstance(value, int):
            lines.append(f"constexpr int {name} = {value};")
        elif isinstance(value, str):
            lines.append(f"using {name} = {value};")
        else:
            raise TypeError(f"constant {name}={value!r}: expected bool, int or a type name")
    return lines


class _Flattener:
    """Expand one entry file; state is what was included and where `#line` stands."""

    def __init__(self, target: Target, gate: str | None, plant: Plant | None) -> None:
        self.target = target
        self.gate = gate
        self.plant = plant
        self.planted = False
        self.seen: set[Path] = set()
        self.lines: list[str] = []

    def text_of(self, path: Path) -> str:
        text = _read(path)
        plant = self.plant
        if plant is not None and path == KERNELS_DIR / plant.file:
            if text.count(plant.find) != 1:
                raise AssertionError(
                    f"plant {plant.name}: its text occurs {text.count(plant.find)} times in {path}"
                )
            self.planted = True
            text = text.replace(plant.find, plant.replace)
        return text

    def expand(self, path: Path, after_types: list[str]) -> None:
        """Append the file's text. `after_types` goes in behind the types header, which the
        constants' types come from."""
        path = path.resolve()
        if path in self.seen:
            return
        self.seen.add(path)
        name = (
            path.relative_to(KERNELS_DIR).as_posix() if KERNELS_DIR in path.parents else path.name
        )
        active = [True]
        renumber = True
        for number, line in enumerate(self.text_of(path).splitlines(), start=1):
            directive = _DIRECTIVE.match(line)
            if directive:
                self.apply(directive[1], directive[2], active, f"{path}:{number}")
                renumber = True
                continue
            if not all(active):
                continue
            include = _INCLUDE.match(line)
            if include:
                self.expand(self.resolve(include[1], path), after_types)
                if include[1] == "@target/types.cuh":
                    self.lines.extend(after_types)
                renumber = True
                continue
            if line.strip() == "#pragma once":
                renumber = True
                continue
            if renumber:
                self.lines.append(f'#line {number} "{name}"')
                renumber = False
            self.lines.append(line)
        if len(active) != 1:
            raise AssertionError(f"{path}: //@if without //@end")

    def resolve(self, include: str, includer: Path) -> Path:
        include = include.replace("@target", self.target)
        for folder in (KERNELS_DIR, includer.parent):
            if (folder / include).is_file():
                return folder / include
        raise FileNotFoundError(f'{includer}: include "{include}" not found')

    def apply(self, word: str, rest: str, active: list[bool], where: str) -> None:
        if word == "if":
            kind, *names = rest.split()
            if kind != "gate":
                raise AssertionError(f"{where}: unknown condition {rest!r}")
            active.append(self.gate is not None and (not names or self.gate in names))
        elif word == "else":
            active[-1] = not active[-1]
        elif word == "end":
            active.pop()
        else:
            raise AssertionError(f"{where}: unknown directive {word!r}")


def flatten(
    entry: str | Path,
    target: Target,
    *,
    constants: Mapping[str, object] | None = None,
    gate: str | None = None,
    plant: Plant | None = None,
    params: str | None = None,
) -> str:
    """Return the translation unit of one kernel file that is written against `prims.cuh`.

    Args:
        entry: path of the file; a relative one is looked up below `kernels/`. The kernel's name is
            the file's stem.
        target: `"ptx"` for NVRTC, `"host"` for the simulator.
        constants: compile-time constants, defined behind the scalar types.
        gate: name of the debug gate to build in.
        plant: bug to plant (a text replacement), for testing the tests.
        params: name of the kernel's parameter struct; the simulator's entry point needs it.

    Returns:
        The source text.
    """
    path = KERNELS_DIR / entry
    flattener = _Flattener(target, gate, plant)
    flattener.expand(path, _constant_lines(constants or {}))
    if plant is not None and not flattener.planted:
        raise AssertionError(f"plant {plant.name}: {plant.file} is not part of {path.name}")
    if target == "host":
        flattener.lines.append(f"#define FC_HOST_KERNEL {path.stem}")
        flattener.lines.append(f"#define FC_HOST_PARAMS {params}")
        flattener.expand(KERNELS_DIR / "host" / "simulator" / "entry.cuh", [])
    return "\n".join(flattener.lines) + "\n"


def kernel_file(kernel: str) -> Path:
    """Return the file of a kernel's text: `NAME.cuh` in the kernel's own folder below `kernels/`.

    Raises:
        FileNotFoundError: if no folder has it.
    """
    for path in KERNELS_DIR.glob(f"*/{kernel}.cuh"):
        return path
    raise FileNotFoundError(f"{KERNELS_DIR}: no folder has {kernel}.cuh")


def generate_source(plan: Plan, target: Target = "ptx", plant: Plant | None = None) -> str:
    """Return the translation unit of a plan's kernel. See `flatten`."""
    return flatten(
        kernel_file(plan.kernel),
        target,
        constants=plan.constants(),
        gate=plan.gate,
        plant=plant,
        params=plan.params_struct,
    )


PROBE = "wmma_probe"


def generate_probe_source(dtype: str) -> str:
    """Return the kernel that checks a GPU's element map for a dtype before its first attention."""
    return flatten(kernel_file(PROBE), "ptx", constants={"Element": dtype})
