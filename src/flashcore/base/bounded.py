"""Keep dictionaries at a size: the oldest entries make room for new ones."""

from __future__ import annotations

from typing import Any


def make_room(known: dict[Any, Any], entries_max: int) -> None:
    """Delete the oldest entries until one more makes at most so many. Whoever calls it holds the
    lock of those who change `known`."""
    while len(known) >= entries_max:
        del known[next(iter(known))]
