"""Declare the types of a prepared call, which whoever prepares or runs it shares."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Of q, k and v, of lengths, and of sinks. Whoever makes a call has them, and asking again takes
# time.
Addresses = tuple[int, ...]
# Takes q, k, v, the mask and addresses; where there are sinks and no kernel is launched, sinks too.
Call = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
