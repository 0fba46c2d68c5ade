"""The CUDA driver's bindings, imported when a kernel is launched."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.errors import BackendUnavailableError


def import_driver() -> Any:
    """The driver's bindings. Raises BackendUnavailableError when they are not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendUnavailableError(
            f"launching a kernel needs cuda-bindings ({error}); "
            'install it: pip install "flashcore[cuda]"'
        ) from error
    return driver


def bind_context(device_index: int | None = None) -> None:
    """Binds a GPU's context to this thread, by default the current device's. A thread that has not
    used the GPU yet has none, and torch need not have bound one for what the thread did so far."""
    from cuda.core import Device

    Device(torch._C._cuda_getDevice() if device_index is None else device_index).set_current()
