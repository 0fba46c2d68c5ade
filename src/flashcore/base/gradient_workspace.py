"""Hold how much memory a backward pass may take for float32 sums of dq."""

from __future__ import annotations

DEFAULT_BYTES = 128 << 20
_BYTES_MAX = 1 << 40  # far above any GPU's memory
_num_bytes = DEFAULT_BYTES


def set_gradient_workspace(num_bytes: int = DEFAULT_BYTES) -> None:
    """Set how much memory a backward pass may take for float32 sums of dq.

    On Hopper, with head_dim up to 128 and neither a mask tensor nor soft-capping, one kernel
    computes dq, dk and dv where there is enough to compute (docs/backward-one-kernel.md has the
    times). It adds up dq in float32, in memory that the pass takes and gives back: 4 bytes an
    element for as many heads as fit into `num_bytes`. If not all heads fit, the pass takes a share
    of them at a time. If too few fit to keep a GPU busy, and always with 0, two kernels compute the
    gradients with 4 bytes a row and head beside them, more slowly. Gradients are deterministic in
    either way, unless a call says deterministic=False; those of the two may differ in their last
    bits.

    Args:
        num_bytes: at most that much; 128 MiB by default. Holds for the whole process, and for
            backward passes that begin from now on.

    Raises:
        TypeError: `num_bytes` is no int.
        ValueError: `num_bytes` is negative, or more than 2^40.
    """
    global _num_bytes
    if not isinstance(num_bytes, int) or isinstance(num_bytes, bool):
        raise TypeError(f"num_bytes is {num_bytes!r}; pass a number of bytes, an int")
    if not 0 <= num_bytes <= _BYTES_MAX:
        raise ValueError(f"num_bytes is {num_bytes}; pass 0 to {_BYTES_MAX}")
    _num_bytes = num_bytes


def workspace_bytes() -> int:
    """Return how much memory a backward pass may take for sums of dq."""
    return _num_bytes
