"""List what lies in the cache, and remove what of it may go; see `flashcore cache`."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashcore.base import store
from flashcore.base.temporary import private_dir

# By kind, the files that flashcore writes below a cache's folder; of others it keeps its hands off.
_KEPT = {
    "kernels": r"kernels/nvrtc-[\d.]+/[0-9a-f]{64}\.bin",
    "simulator": r"sim/(kernel-[0-9a-f]{40}\.so|runtime-[0-9a-f]{40}\.o)",
    "replays": r"sim/inputs/[0-9a-f]{16}\.pt",
    "launcher": r"launcher/launcher-[0-9a-f]{40}\.(so|txt)",
    "tuned tiles": r"tuned-sm_\d+\.json",
}
_OWN_FOLDERS = ("kernels", "sim", "launcher")
LEFTOVERS = "leftovers"
TUNED = "tuned tiles"  # minutes of work, and small: they stay unless they are asked for


@dataclass(frozen=True, slots=True)
class Item:
    """An item describes one file of a cache.

    Args:
        kind: a key of what is kept, or LEFTOVERS.
        path: the file.
        size: in bytes.
        used: when it was last read or written, in seconds since the epoch.
    """

    kind: str
    path: Path
    size: int
    used: float


def items(older_than_s: float = store.STALE_AFTER_S) -> list[Item]:
    """Return the files of the cache, of its stand-in, and what killed processes left in both.

    Args:
        older_than_s: leftovers are temporary files that nobody has touched for so long.
    """
    found = [item for folder in store.folders() for item in _items_in(folder, older_than_s)]
    private = private_dir()
    if private is not None:
        places = [private, private / "locks"]
        found += [
            item
            for place in places
            for path in store.leftovers(place, older_than_s)
            for item in _of(path, LEFTOVERS)
        ]
        locks = (path for path in (private / "locks").glob("*.lock"))
        now = time.time()
        for path in locks:  # whoever waits for one holds it open, an hour later nobody does
            found += [x for x in _of(path, LEFTOVERS) if now - x.used > older_than_s]
    return found


def _items_in(root: Path, older_than_s: float) -> Iterator[Item]:
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        for kind, pattern in _KEPT.items():
            if re.fullmatch(pattern, name):
                yield from _of(path, kind)
    for folder in _folders(root):
        for path in store.leftovers(folder, older_than_s):
            yield from _of(path, LEFTOVERS)


def _folders(root: Path) -> Iterator[Path]:
    for name in _OWN_FOLDERS:
        folder = root / name
        if folder.is_dir():
            yield folder
            yield from (path for path in folder.rglob("*") if path.is_dir())


def _files(root: Path) -> Iterator[Path]:
    yield from root.glob("tuned-sm_*.json")
    for folder in _folders(root):
        yield from (path for path in folder.iterdir() if path.is_file())


def _of(path: Path, kind: str) -> Iterator[Item]:
    with contextlib.suppress(OSError):  # gone meanwhile
        found = path.lstat()
        size = found.st_size
        if path.is_dir() and not path.is_symlink():
            size = sum(inner.lstat().st_size for inner in path.rglob("*") if inner.is_file())
        yield Item(kind, path, size, max(found.st_atime, found.st_mtime))


def to_prune(
    found: Iterable[Item], *, max_bytes: int | None = None, older_than_s: float | None = None
) -> list[Item]:
    """Return the items to remove: leftovers, those not used for long, and then those not used for
    longest until the rest is small enough. Tuned tiles stay.

    Args:
        found: see `items`.
        max_bytes: how much may stay.
        older_than_s: how long an entry may lie unused, in seconds.
    """
    now = time.time()
    gone = [item for item in found if item.kind == LEFTOVERS]
    rest = sorted(
        (item for item in found if item.kind not in (LEFTOVERS, TUNED)),
        key=lambda item: item.used,
    )
    total = sum(item.size for item in rest)
    for item in rest:
        is_old = older_than_s is not None and now - item.used > older_than_s
        if is_old or (max_bytes is not None and total > max_bytes):
            gone.append(item)
            total -= item.size
    return gone


def delete(found: Iterable[Item]) -> tuple[list[Item], list[Item]]:
    """Remove files; return those that went, and those that this user may not remove."""
    gone: list[Item] = []
    stayed: list[Item] = []
    for item in found:
        (gone if store.remove(item.path) else stayed).append(item)
    for root in store.folders():
        for folder in sorted(_folders(root), reverse=True):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
    return gone, stayed
