"""A bundle is one file of kernels that were compiled ahead, for machines where nothing may be.

It is a zip archive. An entry's name is a kernel's key (jit.cache_key), its content what the cache
holds under that key; `about.json` says what wrote it, and for which architectures.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashcore import __version__
from flashcore.base import env
from flashcore.errors import BackendUnavailableError

ABOUT = "about.json"
# Errors of reading a file that is no bundle, or one that is cut off or changed.
_DAMAGED = (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError)


@functools.lru_cache(maxsize=4)
def _archive(path: Path, modified_ns: int, size: int, pid: int) -> zipfile.ZipFile:
    """Return the archive, of which only the list of entries is read. Each process opens its own, as
    a child would share the place in the file with its parent."""
    return zipfile.ZipFile(path)


def _opened(path: Path) -> zipfile.ZipFile:
    found = path.stat()
    return _archive(path, found.st_mtime_ns, found.st_size, os.getpid())


def _unreadable(path: Path, error: Exception) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{env.BUNDLE.name}={path} cannot be read ({type(error).__name__}: {error}); unset it, or "
        "build the bundle anew with `flashcore build`"
    )


def read(path: Path, key: str) -> bytes | None:
    """Return one entry of a bundle, or None where it has none of that key.

    Raises:
        BackendUnavailableError: the bundle is missing or damaged.
    """
    try:
        archive = _opened(path)
        return archive.read(key) if key in archive.NameToInfo else None
    except _DAMAGED as error:
        raise _unreadable(path, error) from error


def about(path: Path) -> dict[str, Any]:
    """Return what a bundle says of itself: "flashcore", its version, "archs" and "kernels", how
    many there are of them; what it does not say is missing.

    Raises:
        BackendUnavailableError: the bundle is missing or damaged.
    """
    content = read(path, ABOUT)
    found: Any = None
    with contextlib.suppress(ValueError):
        found = json.loads(content or b"{}")
    return found if isinstance(found, dict) else {}


def check(path: Path) -> int:
    """Read a whole bundle and return how many kernels it holds.

    Raises:
        BackendUnavailableError: the bundle is missing or damaged.
    """
    try:
        archive = _opened(path)
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"entry {damaged} is damaged")
        count = len(set(archive.namelist()) - {ABOUT})
        if not count:
            raise zipfile.BadZipFile("there is no kernel in it")
        return count
    except _DAMAGED as error:
        raise _unreadable(path, error) from error


def describe_miss(path: Path, label: str, arch: int) -> str:
    """Return sentences on a kernel that a bundle does not hold: which, why, and how to add it."""
    said = about(path)
    archs, version = said.get("archs", []), said.get("flashcore", __version__)
    text = f"The bundle {path} ({env.BUNDLE.name}) does not hold {label}"
    if version != __version__:
        text += f", for flashcore {version} wrote it and this is {__version__}"
    elif archs and arch not in archs:
        text += f", for it was built for {', '.join(f'sm_{known}' for known in archs)}"
    wanted = ",".join(f"sm_{known}" for known in sorted({*archs, arch}))
    return (
        f"{text}. To add it, run with {env.RECORD.name}=calls.json, then "
        f"`flashcore build --arch {wanted} --calls calls.json --output {path}`."
    )


def write(path: Path, entries: Iterable[tuple[str, bytes]], archs: Iterable[int]) -> int:
    """Write a bundle, in place of one that may be in use.

    Args:
        path: the bundle to write.
        entries: keys and packed kernels; the first of a key counts.
        archs: that it is for, 90 for sm_90.

    Returns:
        How many kernels it holds.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    kernels = dict(reversed([*entries]))
    document = {"flashcore": __version__, "archs": sorted(set(archs)), "kernels": len(kernels)}
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(ABOUT, json.dumps(document))
            for key, entry in sorted(kernels.items()):
                archive.writestr(key, entry)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return len(kernels)
