"""Exception and warning types.

A mistake in an argument raises a built-in type; the message names the argument, its value and the
way out:

- ``TypeError``: not a tensor, a wrong dtype, a bool or string where a number belongs;
- ``ValueError``: a wrong value, shape or device;
- ``NotImplementedError``: meaningful, but not supported here (sparse tensors, a paged cache).

The types below are for what the machine, not the call, lacks.
"""

from __future__ import annotations


class FlashCoreError(Exception):
    """Base class of the errors that are not a mistake in an argument."""


class BackendUnavailableError(FlashCoreError, RuntimeError):
    """The requested backend cannot run here: no GPU, a GPU that is too old, a missing package."""


class CompileError(FlashCoreError, RuntimeError):
    """A kernel did not compile; the message holds the compiler's log with kernel lines."""


class FallbackWarning(UserWarning):
    """``backend="auto"`` took the PyTorch path because no kernel serves this call.

    Given once per reason and process. ``backend="torch"`` chooses the same path silently.
    """
