"""docs/architecture.md is a map: whatever it names exists, and whatever exists is on it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "flashcore"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_module_is_on_the_map() -> None:
    modules = {path.name for path in SRC.glob("*.py") if not path.name.startswith("__")}
    packages = {f"{path.parent.name}/" for path in SRC.glob("*/__init__.py")}
    kernels = {path.name for path in (SRC / "kernels").glob("attn_*.cuh")}
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    missing = sorted(n for n in modules | packages | kernels | scripts if n not in TEXT)
    assert missing == []


def test_everything_on_the_map_exists() -> None:
    names = set(re.findall(r"[\w/]+\.(?:py|cuh)\b", TEXT))
    assert len(names) > 40
    folders = (ROOT, ROOT / "scripts", ROOT / "tests", SRC, SRC / "kernels")
    assert sorted(n for n in names if not any((folder / n).is_file() for folder in folders)) == []
