"""Parse each of the project's Python files once, for all tests that look into them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Return a file's syntax tree, as the oldest supported Python reads it; do not change it.

    Raises:
        SyntaxError: that Python does not read it.
    """
    text = path.read_text(encoding="utf-8")
    return ast.parse(text, filename=str(path), feature_version=(3, 10))
