"""Declare the types of a prepared call, which whoever prepares or runs it shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Of q, k and v, of lengths, and of sinks. The caller has them, and asking again takes time.
Addresses = tuple[int, ...]
# A call returns out, lse (None unless it is wanted), and max_score only if it is wanted.
Computed = tuple[Any, ...]
# Takes q, k, v, the mask and addresses; where there are sinks and no kernel is launched, sinks too.
Call = Callable[..., Computed]
