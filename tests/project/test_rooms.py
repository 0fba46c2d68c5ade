"""Rooms are kept: imports point downwards, no circle of files, no folder too full to find a file
in."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sources import parsed

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "flashcore"
MAX_FILES = 16
# A kernel's device text and its Python lie in one folder, and change together.
MAX_FILES_OF_A_KERNEL = 18

# From the ground up. A room imports from itself and from rooms that stand before it.
ROOMS = (
    "errors",
    "base",
    "data",
    "problem",
    "kernels",
    "compile",
    "selection",
    "launch",
    "sim",
    "backends",
    "plain",
    "ops",
    "explanation",
    "api",
    "preparing",
    "serving",
    "dropins",
    "compat",
    "integrations",
    "checks",
    "isolate",
    "bench",
    "tune",
    "cli",
    "__main__",
)
FLOOR = {room: floor for floor, room in enumerate(ROOMS)}


def room_of(module: str) -> str:
    if module.endswith(".__main__"):
        return "__main__"  # a program, which nobody imports: it stands above the rooms
    return module.split(".")[1] if "." in module else "flashcore"


def modules() -> dict[str, Path]:
    found = {}
    for path in SRC.rglob("*.py"):
        parts = path.relative_to(SRC.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Return the modules of flashcore that a file imports, in functions and for types too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashcore"):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("flashcore"))


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for module in MODULES} - {"flashcore"}
    assert rooms == set(ROOMS)


def test_imports_point_downwards() -> None:
    upwards = []
    for module, path in MODULES.items():
        if module == "flashcore":
            continue  # the face: it names what each room offers
        for other in imports(path):
            if other == "flashcore":
                continue
            if FLOOR[room_of(other)] > FLOOR[room_of(module)]:
                upwards.append(f"{module} -> {other}")
    assert sorted(upwards) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    arrows = {
        module: {m for m in imports(path) if m != module}
        for module, path in MODULES.items()
        if module != "flashcore"
    }
    # Take away whatever imports nothing that is left, until nothing changes: circles remain.
    while leaves := [m for m, to in arrows.items() if not to & arrows.keys()]:
        for module in leaves:
            del arrows[module]
    users = {m: {o for o, to in arrows.items() if m in to} for m in arrows}
    while roots := [m for m, of in users.items() if not of & users.keys()]:
        for module in roots:
            del users[module]
    assert sorted(users) == []


def test_no_folder_is_too_full() -> None:
    for top in (SRC, ROOT / "tests"):
        files = Counter(
            path.parent
            for path in top.rglob("*")
            if path.suffix in ({".py", ".cuh", ".cpp", ".h"} if top == SRC else {".py"})
            if path.name != "__init__.py"
        )
        full = {str(k.relative_to(ROOT)): n for k, n in files.items() if n > most_files(k)}
        assert full == {}


def most_files(folder: Path) -> int:
    is_kernel = folder.parent == SRC / "kernels" and (folder / "kernel.py").exists()
    return MAX_FILES_OF_A_KERNEL if is_kernel else MAX_FILES
