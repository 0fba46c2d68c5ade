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
from typing import TYPE_CHECKING, Literal, NamedTuple

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


@functools.cache
def _resolved(path: Path) -> Path:
    return path.resolve()


@functools.cache
def _name(path: Path) -> str:
    """Return what `#line` calls a file."""
    return path.relative_to(KERNELS_DIR).as_posix() if KERNELS_DIR in path.parents else path.name


@functools.cache
def _included(include: str, includer: Path) -> Path:
    """Return the file that an include names: below `kernels/`, or beside the includer."""
    for folder in (KERNELS_DIR, includer.parent):
        if (folder / include).is_file():
            return _resolved(folder / include)
    raise FileNotFoundError(f'{includer}: include "{include}" not found')


class _Part(NamedTuple):
    """A part of a file is an include, a directive, or the lines between two of those, as one
    text."""

    kind: Literal["lines", "include", "directive"]
    number: int  # of its first line
    text: str


@functools.lru_cache(maxsize=1024)
def _parts(text: str) -> tuple[_Part, ...]:
    """Return the parts of a file's text. `#pragma once` only ends one: flattening does what it
    asks for."""
    parts: list[_Part] = []
    lines: list[str] = []

    def end_lines(number: int) -> None:
        if lines:
            parts.append(_Part("lines", number - len(lines), "\n".join(lines)))
            lines.clear()

    number = 0
    for number, line in enumerate(text.splitlines(), start=1):
        include = _INCLUDE.match(line)
        is_directive = _DIRECTIVE.match(line) is not None
        if include is None and not is_directive and line.strip() != "#pragma once":
            lines.append(line)
            continue
        end_lines(number)
        if is_directive:
            parts.append(_Part("directive", number, line))
        elif include is not None:
            parts.append(_Part("include", number, include[1]))
    end_lines(number + 1)
    return tuple(parts)


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
    """Expand one entry file; state is what was included, and whether the bug was planted."""

    def __init__(self, target: Target, gate: str | None, plant: Plant | None) -> None:
        self.target = target
        self.gate = gate
        self.plant = plant
        self.planted_file = None if plant is None else KERNELS_DIR / plant.file
        self.planted = False
        self.seen: set[Path] = set()
        self.lines: list[str] = []

    def text_of(self, path: Path) -> str:
        text = _read(path)
        plant = self.plant
        if plant is not None and path == self.planted_file:
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
        if path in self.seen:
            return
        self.seen.add(path)
        active = [True]
        for kind, number, text in _parts(self.text_of(path)):
            if kind == "directive":
                self.apply(text, active, f"{path}:{number}")
            elif not all(active):
                continue
            elif kind == "include":
                self.expand(_included(text.replace("@target", self.target), path), after_types)
                if text == "@target/types.cuh":
                    self.lines.extend(after_types)
            else:
                self.lines += (f'#line {number} "{_name(path)}"', text)
        if len(active) != 1:
            raise AssertionError(f"{path}: //@if without //@end")

    def apply(self, line: str, active: list[bool], where: str) -> None:
        directive = _DIRECTIVE.match(line)
        assert directive is not None
        word, rest = directive.groups()
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
    flattener.expand(_resolved(path), _constant_lines(constants or {}))
    if plant is not None and not flattener.planted:
        raise AssertionError(f"plant {plant.name}: {plant.file} is not part of {path.name}")
    if target == "host":
        flattener.lines.append(f"#define FC_HOST_KERNEL {path.stem}")
        flattener.lines.append(f"#define FC_HOST_PARAMS {params}")
        flattener.expand(_resolved(KERNELS_DIR / "host/simulator/entry.cuh"), [])
    return "\n".join(flattener.lines) + "\n"


@functools.cache
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
