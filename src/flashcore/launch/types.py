"""Declare the types of a prepared call, which whoever prepares or runs it shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

# Of q, k and v, of lengths, and of sinks. The caller has them, and asking again takes time.
Addresses = tuple[int, ...]
# A call returns out, lse (None unless it is wanted), and max_score only if it is wanted.
Computed = tuple[Any, ...]
# Takes q, k, v, the mask and addresses; where there are sinks and no kernel is launched, sinks too.
Call = Callable[..., Computed]


class KernelEntry(NamedTuple):
    """Hold what the compiled launcher needs to launch one kernel of a backward pass.

    Args:
        kernel: handle.
        grid: blocks.
        num_threads: a block.
        smem_bytes: dynamic shared memory a block.
        starts_early: see driver_launch.Launch.
        argument: the kernel's struct, with addresses to be replaced.
        pointers: where it has addresses, in bytes, and which of the pass's tensors they are of.
        maps: where it has descriptors, in bytes; which of the tensors they are of; and how many
            bytes before that tensor they begin.
        counters: where the addresses of counters are, and how many bytes behind the first of the
            pass's these are.
    """

    kernel: int
    grid: int
    num_threads: int
    smem_bytes: int
    starts_early: bool
    argument: bytes
    pointers: tuple[tuple[int, int], ...]
    maps: tuple[tuple[int, int, int], ...]
    counters: tuple[tuple[int, int], ...]


class PassEntry(NamedTuple):
    """Hold what the compiled launcher needs to run a prepared backward pass.

    Its tensors are q, k, v, out, lse and the gradient of out, and behind these those that are made.

    Args:
        device_index: of the GPU, which must be current.
        kernels: in the order that they run in.
        made: shape, strides, and the dtype, of each tensor that is made: 0 that of q, 1 float32,
            2 int32.
        gradients: which of those are dq, dk and dv.
        num_counters: of the pass; 0 for none.
    """

    device_index: int
    kernels: tuple[KernelEntry, ...]
    made: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    gradients: tuple[int, ...]
    num_counters: int


class Prepared(Protocol):
    """Prepared is a backward pass whose tensors' addresses alone may differ."""

    def __call__(self, addresses: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dq, dk and dv.

        Args:
            addresses: of q, k, v, out, lse and the gradient of out, then of the mask and of
                lengths, where there are some.
        """
        ...

    def entry(self) -> PassEntry:
        """Return the entry for the compiled launcher; of a pass without a mask and lengths."""
        ...
