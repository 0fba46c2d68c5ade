"""Divide parameters of a test between `make test` and `make test-thorough`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thorough_but(cheap: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return all values as parameters, in their order: those that are not in `cheap` are marked
    thorough."""
    cheap = list(cheap)
    return [
        value if value in cheap else pytest.param(value, marks=pytest.mark.thorough)
        for value in values
    ]
