"""The CUDA driver's bindings, imported when a kernel is launched."""

from __future__ import annotations

from typing import Any

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
