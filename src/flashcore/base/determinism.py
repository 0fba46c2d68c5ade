"""Hold whether gradients may differ in their last bits from run to run."""

from __future__ import annotations

import torch

_allowed = False


def allow_nondeterministic_gradients(allowed: bool = True) -> None:
    """Allow kernels whose sums have no fixed order to compute gradients, or forbid them again.

    They are forbidden by default. On Hopper, with head_dim up to 128 (above 96 without a window
    that has a left bound), and neither a mask tensor nor soft-capping, one kernel then computes dq,
    dk and dv, faster than the two deterministic ones (docs/backward.md has the times). It takes
    float32 memory as large as q meanwhile, and dq may differ in its last bits from run to run. Of
    `torch.use_deterministic_algorithms(True)` and this, torch's wins.

    Args:
        allowed: holds for the whole process, and for backward passes that begin from now on.

    Raises:
        TypeError: `allowed` is not a bool.
    """
    global _allowed
    if not isinstance(allowed, bool):
        raise TypeError(f"allowed is {allowed!r}; pass True or False")
    _allowed = allowed


def may_differ() -> bool:
    """Return whether gradients may differ in their last bits from run to run."""
    return _allowed and not torch.are_deterministic_algorithms_enabled()
