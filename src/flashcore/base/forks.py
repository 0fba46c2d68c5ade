"""Make locks that a forked child finds free.

A fork copies locks as they are, and only the thread that forks lives on in the child: a lock that
another thread held at that moment stays locked there for ever, and what it guards is half changed.
So a fork takes these locks first, which means that it waits for their holders, and gives them back
on both sides.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _thread import RLock


def lock() -> RLock:
    """Return a lock that is free, and guards a consistent state, in a child of any fork.

    It is reentrant, so that a fork in the thread that holds it (by a signal's handler) goes on. It
    lives as long as the process: for modules, not for objects.
    """
    made = threading.RLock()
    if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
        os.register_at_fork(
            before=made.acquire, after_in_parent=made.release, after_in_child=made.release
        )
    return made
