"""Define the types of exceptions and warnings.

A mistake in an argument raises a built-in type; the message names the argument, its value and the
way out:

- ``TypeError``: not a tensor, a wrong dtype, a bool or string where a number belongs;
- ``ValueError``: a wrong value, shape or device;
- ``NotImplementedError``: meaningful, but not supported here (sparse tensors, a cache of 8 bits).

The types below are for what the machine, not the call, lacks.
"""

from __future__ import annotations

import os
import sys
import warnings


class FlashCoreError(Exception):
    """This is the base class of the errors that are not a mistake in an argument."""


class BackendUnavailableError(FlashCoreError, RuntimeError):
    """The requested backend cannot run here: no GPU, a GPU that is too old, a missing package."""


class CompileError(FlashCoreError, RuntimeError):
    """A kernel did not compile; the message holds the compiler's log with kernel lines."""


class FallbackWarning(UserWarning):
    """``backend="auto"`` took the PyTorch path because no kernel serves this call.

    Given once per reason and process. ``backend="torch"`` chooses the same path silently.
    """


def stacklevel_of_caller() -> int:
    """Return for warnings.warn in the function that calls this: who called flashcore, past torch if
    it stands between."""
    inside: tuple[str, ...] = (os.path.dirname(__file__),)
    if "torch" in sys.modules:
        inside += (os.path.dirname(str(sys.modules["torch"].__file__)),)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


_warned: set[str] = set()


def notice_once(key: str, message: str) -> None:
    """Warn whoever called flashcore of something in its surroundings, once a process.

    Args:
        key: of warnings with the same key the first is given.
        message: what is wrong and what to do about it.
    """
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel_of_caller())
