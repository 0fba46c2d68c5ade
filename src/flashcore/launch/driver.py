"""Reach the CUDA driver: its bindings, imported when a kernel is launched, and the few functions
that a call needs, by address."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flashcore.base.machine import install_command
from flashcore.errors import BackendUnavailableError, FlashCoreError

INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_API_VERSION = 12000  # all of the functions by address are as old


def import_driver() -> Any:
    """Return the driver's bindings. Raises BackendUnavailableError when they are not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendUnavailableError(
            f"launching a kernel needs cuda-core and cuda-bindings ({error}); "
            f"install them: {install_command()}"
        ) from error
    return driver


class LaunchAttribute(ctypes.Structure):
    """Mirror CUlaunchAttribute, with the one value that is used here."""

    _fields_ = [
        ("id", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("programmatic_stream_serialization_allowed", ctypes.c_int32),
        ("unused", ctypes.c_uint8 * 60),
    ]


class LaunchConfig(ctypes.Structure):
    """Mirror CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("smem_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint32),
    ]


def entry_address(name: str) -> int:
    """Return where a function of the driver is, such as "cuLaunchKernelEx".

    Raises:
        BackendUnavailableError: the bindings are not installed, or the driver lacks the function.
    """
    status, address, _ = import_driver().cuGetProcAddress(name.encode(), _API_VERSION, 0)
    if int(status) or not address:
        raise BackendUnavailableError(
            f"this driver has no {name} ({status!r}); install one for CUDA 12 or later"
        )
    return int(address)


@functools.cache
def entry_point(name: str) -> Callable[..., int]:
    """Return a function of the driver that returns a CUresult, here as an int; raises as
    `entry_address`.

    It takes what ctypes takes. Arguments that are kept from call to call, made by `pointer` or
    ctypes.byref, cost it half of what the bindings take to convert theirs.
    """
    return ctypes.CFUNCTYPE(ctypes.c_int)(entry_address(name))


def pointer(address: int | None) -> Any:
    """Return an address as an argument of a function by `entry_point`."""
    return ctypes.c_void_p.from_param(address)


def check(status: int, what: str) -> None:
    """Raise FlashCoreError unless a function of the driver succeeded."""
    if status:
        raise FlashCoreError(f"{what} failed: {import_driver().CUresult(status)!r}")


def bind_context(device_index: int | None = None) -> None:
    """Bind a GPU's context to this thread, by default the current device's. A thread that has not
    used the GPU yet has none, and torch need not have bound one for what the thread did so far."""
    from cuda.core import Device

    Device(torch._C._cuda_getDevice() if device_index is None else device_index).set_current()


@contextlib.contextmanager
def allowed_during_a_capture() -> Iterator[None]:
    """Let this thread do what CUDA forbids while a stream is being captured, because a capture that
    relied on it would be wrong: allocate, load a kernel, wait for a stream that is not captured."""
    driver = import_driver()
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    status, before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    check(int(status), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def allocate_zeros(device_index: int, num_bytes: int) -> int:
    """Return the address of zeroed memory on a GPU, for as long as the process lives: none of
    torch's, and of no CUDA graph, though one be captured.

    Raises:
        FlashCoreError: the driver refuses; the message holds its status.
    """
    driver = import_driver()

    def call(name: str, *arguments: Any) -> Any:
        status, *results = getattr(driver, name)(*arguments)
        check(int(status), f"allocating {num_bytes} bytes for counters: {name}")
        return results[0] if results else None

    with torch.cuda.device(device_index):
        bind_context(device_index)
        with allowed_during_a_capture():
            # Not the current stream, which may be captured, and none that waits for others.
            stream = call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            try:
                address = call("cuMemAlloc", num_bytes)
                call("cuMemsetD8Async", address, 0, num_bytes, stream)
                call("cuStreamSynchronize", stream)
            finally:
                call("cuStreamDestroy", stream)
    return int(address)
