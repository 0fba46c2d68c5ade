"""The glossary stays in order, and names modules that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", TEXT, re.MULTILINE)][2:]


def test_terms_are_in_order_and_explained_once() -> None:
    terms = [row[0].lower() for row in ROWS]
    assert len(terms) > 40
    assert terms == sorted(set(terms))
    assert [row[0] for row in ROWS if len(row) != 3 or not row[1].endswith((".", ".)"))] == []


def test_modules_of_the_glossary_exist() -> None:
    files = [path.as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()]
    named = set(re.findall(r"`([\w/]+\.(?:py|cuh|cpp))`", TEXT))
    missing = [name for name in named if not any(file.endswith(f"/{name}") for file in files)]
    assert sorted(missing) == []
