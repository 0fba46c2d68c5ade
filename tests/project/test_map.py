"""docs/architecture.md is a map: whatever it names exists, and whatever exists is on it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "flashcore"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_room_and_script_is_on_the_map() -> None:
    modules = {path.name for path in SRC.glob("*.py") if not path.name.startswith("__")}
    packages = {f"{path.parent.name}/" for path in SRC.glob("*/__init__.py")}
    kernels = {path.name for path in (SRC / "kernels").glob("*/attn_*.cuh")}
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    missing = sorted(n for n in modules | packages | kernels | scripts if n not in TEXT)
    assert missing == []


def test_everything_on_the_map_exists() -> None:
    """Each path as it stands, or in the room in whose row of the table it is named."""
    files = {path.name for folder in (SRC, ROOT / "scripts") for path in folder.rglob("*.py")}
    named = set(re.findall(r"(?<![\w/*])[\w/]+\.(?:py|cuh)\b", TEXT))
    assert len(named) > 40
    folders = (ROOT, SRC, SRC / "kernels")
    absent = [n for n in named if not any((folder / n).is_file() for folder in folders)]
    assert sorted(n for n in absent if n not in files and not n.startswith("test_")) == []


def test_a_row_names_modules_of_its_own_room() -> None:
    for room, text in re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", TEXT, re.MULTILINE):
        folder = next(f for f in (ROOT / room, SRC / room) if f.is_dir())
        for name in re.findall(r"`(\w+\.py)`", text):
            assert list(folder.rglob(name)), f"{room} has no {name}"
