"""Declare the types of a prepared call, which whoever prepares or runs it shares."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Of q, k and v, and of lengths. Whoever makes a call has them, and asking again takes time.
Addresses = tuple[int, ...]
Call = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Addresses],
    tuple[torch.Tensor, torch.Tensor | None],
]
