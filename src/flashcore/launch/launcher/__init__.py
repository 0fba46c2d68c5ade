"""This package makes the eager call in C++ (launcher.cpp), where a compiler can build it.

It does what calls.attend does for the common call, for less than half of the time. For a
description that is new it asks Python once (`_prepare`); unusual calls it leaves to Python.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from flashcore.base import env
from flashcore.errors import FlashCoreError, stacklevel_of_caller
from flashcore.launch.counters import clear_counters, work_counters
from flashcore.launch.types import PassEntry
from flashcore.problem.options import Options

# The arguments of `attention`, q, k, v, mask, causal, window, softcap, scale, seqlens_k,
# return_lse, backend and deterministic, and what decides for a drop-in function (see calls.attend)
# or None, to what it returns, or to None: Python has to. Set by `start`.
attend: Callable[..., Any] | None = None


class Lookup(NamedTuple):
    """Hold how calls are looked up by whoever prepares them (ops/calls.py).

    Args:
        find: returns what computes calls like one, see calls.find.
        backends: that a caller may name.
        calls_max: how many descriptions of calls are remembered.
    """

    find: Callable[..., Any]
    backends: tuple[str, ...]
    calls_max: int


class Passes(NamedTuple):
    """Hold how backward passes are found by whoever prepares them (ops/eager.py).

    `entry` and `run` take what `Lookup.find` found, q, k, v, out, lse and the gradient of out.

    Args:
        entry: returns the PassEntry for such tensors; None where the operator has to compute.
        run: returns dq, dk and dv, by Python; None likewise.
        circumstances: returns what else decides which kernels a pass has, as a number below 2^42.
    """

    entry: Callable[..., PassEntry | None]
    run: Callable[..., Any]
    circumstances: Callable[[], int]


# A call that was prepared here is looked up here, whatever key it has in Python.
_KEPT_BY_LAUNCHER = "the launcher"

# Handed over by ops/calls.py and ops/eager.py when these are imported.
lookup: Lookup | None = None
passes: Passes | None = None


class Entry(NamedTuple):
    """Hold what a launch needs, as launcher.cpp reads it.

    Args:
        kernel: handle.
        device_index: of the GPU, which must be current.
        grid: blocks.
        num_threads: a block.
        smem_bytes: dynamic shared memory a block.
        starts_early: see driver_launch.Launch.
        argument: the kernel's struct, with addresses to be replaced.
        attn_offset: where AttnParams begins in it, in bytes.
        map_offsets: where the descriptors of q, k, v and out are; none for the portable kernel.
        out_shape: [batch, num_heads_q, seqlen_q, head_dim_v].
        computes_lse: whether lse is wanted, by the caller or by autograd.
        options: validated, for the backward pass.
        found: what `Lookup.find` found, for the backward pass.
        num_counters: that its blocks share out work by, see launch/counters.py; 0 for none.
        num_shares: float32 elements of the shares of out, where blocks share the keys of row tiles.
        num_floats: of all that these hand over, the state of the softmax behind the shares.
        scratch_offsets: where the addresses of the counters, the shares and the state are.
    """

    kernel: int
    device_index: int
    grid: int
    num_threads: int
    smem_bytes: int
    starts_early: bool
    argument: bytes
    attn_offset: int
    map_offsets: tuple[int, ...]
    out_shape: tuple[int, ...]
    computes_lse: bool
    options: Options
    found: object
    num_counters: int
    num_shares: int
    num_floats: int
    scratch_offsets: tuple[int, ...]


def start() -> None:
    """Put the compiled launcher in the way of calls, unless the environment forbids it.

    Called when a kernel is about to be launched, it acts once. Where the launcher has been built,
    or is asked for, it serves from now on; else from when it is built, in the background. Where it
    cannot be built, calls go by Python; a warning says so to those who asked for it.

    Raises:
        ValueError: the variable has no meaning.
    """
    if lookup is not None and passes is not None:  # else nobody is there yet who would ask it
        _start()


@functools.cache
def _start() -> None:
    asked = env.launcher()
    if asked == "python":
        return
    if asked == "auto":
        from flashcore.launch.launcher import background

        background.start(_use)
        return
    try:
        from flashcore.launch.launcher.build import load

        _use(load())
    except (FlashCoreError, OSError, ImportError) as error:
        warnings.warn(
            f"{env.LAUNCHER.name}=compiled, but the launcher cannot be built or loaded: {error}\n"
            "Calls go by Python: the same results, a few microseconds later. Unset "
            f"{env.LAUNCHER.name} to silence this",
            RuntimeWarning,
            stacklevel=stacklevel_of_caller(),
        )


def settled() -> str:
    """Return what launches from now on, "python" or "compiled"; waits where it is being built."""
    from flashcore.launch.launcher import background

    start()
    background.wait()
    return "python" if attend is None else "compiled"


def _use(module: Any) -> None:
    """Put a module that is built in the way of calls."""
    global attend
    attend = _configured(module).attend


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Launch by "python" or "compiled" in this process, whatever the environment asks for; for
    benchmarks and tests.

    Raises:
        FlashCoreError, OSError, ImportError: the launcher cannot be built or loaded.
    """
    global attend
    if torch.cuda.is_available():  # or a kernel's first launch would begin to build meanwhile
        settled()
    before = attend
    attend = configured().attend if name == "compiled" else None
    try:
        yield
    finally:
        attend = before


def configured() -> Any:
    """Return the extension module, built if need be, with nothing prepared yet.

    Raises:
        FlashCoreError, OSError, ImportError: it cannot be built or loaded.
    """
    from flashcore.launch.launcher.build import load

    return _configured(load())


def _configured(module: Any) -> Any:
    """Return a launcher's module with nothing prepared yet."""
    from flashcore.launch.driver import entry_address

    assert lookup is not None
    assert passes is not None
    module.configure(
        entry_address("cuLaunchKernelEx"),
        entry_address("cuTensorMapReplaceAddress"),
        torch._C._cuda_getDevice,
        torch._C._cuda_getCurrentRawStream,
        _counters,
        _clear,
        entry_address("cuStreamIsCapturing"),
        _prepare,
        lookup.backends,
        lookup.calls_max,
        *passes,
    )
    return module


def _counters(device_index: int, count: int) -> int:
    """Return address of counters for a launch on the device's current stream, which stay the
    stream's unless it is being captured."""
    return work_counters(torch.device("cuda", device_index), count)


def _clear(device_index: int, address: int, count: int) -> None:
    """Put counters of the current stream back to 0: a pass failed that had begun."""
    clear_counters(torch.device("cuda", device_index), address, count)


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool | str,
    window: tuple[int, int] | None,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
    recorded: bool,
    deterministic: bool,
    decide: Callable[..., Any] | None,
) -> Entry | None:
    """Return what a call launches, for the launcher to remember; None if it launches no kernel.

    Raises:
        Exception: what `attention` raises.
    """
    assert lookup is not None
    asked = q, k, v, None, causal, window, softcap, scale, return_lse, backend, recorded
    if decide is None:
        found = lookup.find(*asked, deterministic=deterministic)
    else:
        found = decide(*asked, _KEPT_BY_LAUNCHER)
    kernel = None if found is None else getattr(found.call, "__self__", None)
    if kernel is None:
        return None
    entry: Entry = kernel.entry(q.data_ptr(), k.data_ptr(), v.data_ptr())
    return entry._replace(found=found)
