"""Build the compiled launcher in the background, while Python launches.

A process of its own compiles (build.py), at low priority, and ends by itself if the one that
started it has ended before. A thread waits for it, and then hands over to the launcher. Nothing
here warns or raises: what is launched, and what comes out, is the same either way.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from flashcore.base import store
from flashcore.errors import FlashCoreError
from flashcore.launch.launcher import build

Use = Callable[[Any], None]

_thread: threading.Thread | None = None


def start(use: Use) -> None:
    """Hand over to the launcher, at once if it is built, else when that is done.

    Args:
        use: is given the launcher's module, in another thread perhaps.
    """
    global _thread
    with contextlib.suppress(FlashCoreError, OSError, ImportError):
        module = build.load_built()
        if module is not None:
            use(module)
        elif not obstacle():
            _thread = threading.Thread(
                target=_build_and_use, args=(use,), name="flashcore-launcher", daemon=True
            )
            _thread.start()


def obstacle() -> str:
    """Return why the launcher, where it is not built, cannot be; empty if nothing is known."""
    try:
        build.check_headers()
        failure = store.find(build.KIND, build.failure_name())
    except FlashCoreError as error:
        return str(error)
    if failure is not None:
        return failure.decode(errors="replace")
    if build.python_command("") is None:
        return "Python is embedded in another program, which cannot be asked to build it"
    return ""


def is_built() -> bool:
    """Return whether the launcher is in the cache, built for this Python and this torch."""
    try:
        return store.find(build.KIND, build.library_name()) is not None
    except FlashCoreError:
        return False


def wait() -> None:
    """Return when what `start` began has ended, and the launcher is in use or will not be."""
    if _thread is not None:
        _thread.join()


def _build_and_use(use: Use) -> None:
    with contextlib.suppress(FlashCoreError, OSError, ImportError):
        # Of the processes of a job one has it built, and the others wait.
        with store.lock(f"{build.library_name()}-in-the-background"):
            module = build.load_built()
            if module is None and not obstacle():
                _build()
                module = build.load_built()
        if module is not None:
            use(module)


def _build() -> None:
    """Return when a process has built the launcher, or has not."""
    command = build.python_command("flashcore.launch.launcher.build")
    assert command is not None
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        command,
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
        env=build.child_environment(),
        start_new_session=True,  # an interrupt from the keyboard is not meant for it
    )
    process.wait()
