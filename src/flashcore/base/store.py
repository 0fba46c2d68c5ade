"""Keep files that one process leaves for the next: compiled kernels and what a C++ compiler built.

They lie in the cache folder and, where nothing can be written there, in a private temporary one.
Several processes and several users may share a cache, so

- a file is written under a temporary name and renamed: a reader sees all of it or nothing;
- its mode is the umask's, and a folder's that of the cache, so others read what they may;
- it ends with a checksum, for disks fill up and machines stop: what does not match is missing;
- nothing that somebody may need is deleted: a damaged file is replaced, or left where it is.

cuda.core.utils.FileStreamProgramCache is not used: its files are its user's alone, it needs to
write in order to read, has no checksum, and holds code without the compiler's report. Two good
habits of its are kept: temporary files go after an hour, and reading a file marks it as used, which
is what `flashcore cache prune` goes by.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashcore.base import env
from flashcore.base.temporary import private_dir
from flashcore.errors import notice_once

_MARK = b"\nflashcore seal 1\n"
_SEAL_BYTES = len(_MARK) + hashlib.sha256().digest_size
TEMPORARY = ".tmp"
STALE_AFTER_S = 3600  # no compiler and no copy takes as long
LOCK_TIMEOUT_S = 600  # then whoever holds it has been stopped


def seal(content: bytes) -> bytes:
    """Return the content with its checksum behind it, where loaders and linkers do not look."""
    return content + _MARK + hashlib.sha256(content).digest()


def unseal(data: bytes) -> bytes | None:
    """Return the content that `seal` was given, or None where the data are damaged."""
    content, mark = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    return content if mark == _MARK + hashlib.sha256(content).digest() else None


def folders() -> list[Path]:
    """Return the cache folder and, behind it, the private one that stands in for this cache where
    nothing can be written there; neither need exist."""
    wanted, private = env.cache_dir(), private_dir()
    if private is None or private in wanted.parents:
        return [wanted]
    which = hashlib.sha256(os.fsencode(wanted.absolute())).hexdigest()[:16]
    return [wanted, private / f"instead-of-{which}"]


_damaged: set[Path] = set()  # found so by this process
_repaired: set[Path] = set()  # of these, those that it wrote anew


def read(path: Path) -> bytes | None:
    """Return the content of a sealed file; None where it is missing, damaged or another's."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = unseal(data)
    if content is None:
        if path in _repaired:
            notice_once(
                f"damaged {path}",
                f"{path} is damaged again after it was written anew; check the disk, or set "
                f"{env.CACHE_DIR.name} to another folder",
            )
        _damaged.add(path)
        return None
    with contextlib.suppress(OSError):  # it may be another's, or on a read-only disk
        modified_ns = path.stat().st_mtime_ns
        os.utime(path, ns=(time.time_ns(), modified_ns))  # disks seldom note when a file is read
    return content


def find(kind: str, name: str) -> bytes | None:
    """Return the content of the first file of that kind and name that is whole."""
    found = (read(folder / kind / name) for folder in folders())
    return next((content for content in found if content is not None), None)


def keep(kind: str, name: str, content: bytes, roots: Sequence[Path] | None = None) -> Path | None:
    """Write a sealed file, where it is possible, for others to find.

    Args:
        kind: the folder in the cache, such as "sim".
        name: the file's.
        content: what `find` is to return.
        roots: where it may be written, the best first; by default `folders()`.

    Returns:
        The file; None where it could not be written anywhere. A warning says so once.
    """
    others = list(folders() if roots is None else roots)
    while others:
        folder = others.pop(0)
        try:
            write(folder, kind, name, seal(content))
        except OSError as error:
            instead = f"is kept in {others[0]}" if others else "cannot be kept"
            notice_once(
                f"unwritable {folder}",
                f"nothing can be written to the cache {folder} ({error}): what is compiled "
                f"{instead}; set {env.CACHE_DIR.name} to a writable folder",
            )
        else:
            path = folder / kind / name
            _repaired.update({path} & _damaged)
            return path
    return None


def write(root: Path, kind: str, name: str, data: bytes) -> None:
    """Write a file below a folder, which is made if need be. A process that reads meanwhile sees
    the old file or the new one.

    Raises:
        OSError: that is not possible; nothing is left behind. So too where there is such a file
            that this user may not read: it may be somebody's who can.
    """
    folder = _made(root, kind)
    path = folder / name
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(f"{path} is another user's")
    if kind:  # and not a folder of the user's own
        sweep(folder)
    temporary = folder / f".{name[:32]}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"
    try:
        # Not tempfile's, which nobody but this user could read.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _made(root: Path, kind: str) -> Path:
    """Return a folder below a root, with the root's mode: where others may write, they may here."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root
    for part in Path(kind).parts:
        folder = folder / part
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(stat.S_IMODE(root.stat().st_mode))
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    return folder


def sweep(folder: Path) -> None:
    """Remove, once a process, what writers and compilers that were killed left in a folder."""
    _sweep(folder, os.getpid())


@functools.cache
def _sweep(folder: Path, pid: int) -> None:
    for path in leftovers(folder):
        remove(path)


def leftovers(folder: Path, older_than_s: float = STALE_AFTER_S) -> list[Path]:
    """Return the temporary files and folders in a folder that nobody has touched for so long."""
    found, now = [], time.time()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                if path.name.endswith(TEMPORARY) and now - path.lstat().st_mtime > older_than_s:
                    found.append(path)
    return found


def remove(path: Path) -> bool:
    """Remove a file or a folder; return False where that is not permitted."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def lock(name: str) -> Iterator[bool]:
    """Let one process of this user at a time do what the name stands for; others wait. Yields
    whether the lock is held.

    Locks lie in the private folder and not in the cache: that may be read-only, another user's, or
    on a network's disk. The system drops those of a process that ends. Where a lock cannot be had,
    work is merely done twice.
    """
    from filelock import FileLock  # not needed, hence not loaded, where all is found

    held = None
    private = private_dir()
    if private is not None:
        with contextlib.suppress(OSError):  # filelock.Timeout is one
            (private / "locks").mkdir(exist_ok=True)
            waiting = FileLock(private / "locks" / f"{name}.lock")
            waiting.acquire(timeout=LOCK_TIMEOUT_S)
            held = waiting
    try:
        yield held is not None
    finally:
        if held is not None:
            held.release()
