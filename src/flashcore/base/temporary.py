"""Make a folder for temporary files that only this user reads and writes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path


def private_dir() -> Path | None:
    """Return the folder, which exists; None where no temporary file can be made at all.

    All processes of a user share it, so that what they build without a cache is built once and
    does not pile up. Its files may be executed, so it has to be this user's and closed to
    others; if somebody else took its name, this process gets a folder that goes when it ends.
    """
    try:
        parent = tempfile.gettempdir()
    except OSError:  # "No usable temporary directory found"
        return None
    folder = Path(parent) / f"flashcore-{_uid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if _is_private(folder):
            return folder
        return _of_process(parent, os.getpid())
    except OSError:
        return None


def _uid() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _is_private(folder: Path) -> bool:
    found = folder.lstat()  # a link could be moved to another folder later
    mode = stat.S_IMODE(found.st_mode)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == _uid() and not mode & 0o077


@functools.cache
def _of_process(parent: str, pid: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="flashcore-", dir=parent))

    def remove() -> None:
        if os.getpid() == pid:  # and not a child that ends before its parent
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
