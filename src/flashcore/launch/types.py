"""Declare the types of a prepared call, which whoever prepares or runs it shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Of q, k and v, and of lengths. Whoever makes a call has them, and asking again takes time.
Addresses = tuple[int, ...]
# What calls return: out, lse (None unless it is wanted), and max_score only if it is wanted.
Computed = tuple[Any, ...]
Call = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Addresses], Computed
]
