"""Find this machine's C++ compiler, and build libraries of the simulator and the launcher with it.

The name of a build in the cache is a hash of its sources, compiler and flags. A build is made in a
private temporary folder and then kept by base/store.py, so another process sees the whole build or
none, and a damaged build is made again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flashcore.base import env, store
from flashcore.base.temporary import private_dir
from flashcore.errors import BackendUnavailableError, CompileError, notice_once

Built = TypeVar("Built")

_SEARCH = ("g++", "clang++", "c++")


@dataclass(frozen=True, slots=True)
class Compiler:
    """A Compiler is a C++ compiler: the words of its command, and an identity, which differs
    between versions of one compiler."""

    command: tuple[str, ...]
    identity: str

    def __str__(self) -> str:
        return shlex.join(self.command)


def _identity(executable: str) -> str:
    path = Path(executable).resolve()
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"


def _from_text(text: str, variable: str) -> Compiler:
    words = shlex.split(text)
    found = shutil.which(words[0]) if words else None
    if found is None:
        raise BackendUnavailableError(
            f"{variable}={text!r}: no such program; set it to a C++20 compiler, or unset it"
        )
    return Compiler((found, *words[1:]), " ".join((_identity(found), *words[1:])))


@functools.lru_cache(maxsize=8)
def _find_compiler(what: str, explicit: str | None, cxx: str | None, path: str) -> Compiler:
    if explicit:
        return _from_text(explicit, env.CXX.name)
    if cxx and shutil.which((shlex.split(cxx) or [""])[0]):
        return _from_text(cxx, "CXX")
    for name in _SEARCH:
        found = shutil.which(name, path=path)
        if found:
            return Compiler((found,), _identity(found))
    package = importlib.util.find_spec("ziglang")
    if package:
        try:
            version = importlib.metadata.version("ziglang")
        except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
            version = str(package.origin)
        return Compiler((sys.executable, "-m", "ziglang", "c++"), f"ziglang {version}")
    raise BackendUnavailableError(
        f"{what} needs a C++20 compiler and found none. Looked for "
        f"{env.CXX.name}, CXX, {', '.join(_SEARCH)} on PATH, and the Python package ziglang. "
        "Install one: apt install g++, or pip install ziglang"
    )


def find_compiler(what: str) -> Compiler:
    """Return the compiler of this machine.

    Args:
        what: needs it, for the error: "the simulator".

    Returns:
        The first of FLASHCORE_CXX, $CXX, g++, clang++, c++ on PATH, and the package ziglang.

    Raises:
        BackendUnavailableError: there is none; the message says what to install.
    """
    return _find_compiler(what, env.cxx(), os.environ.get("CXX"), os.environ.get("PATH", ""))


def compile_file(compiler: Compiler, arguments: list[str], target: Path, what: str) -> None:
    """Run the compiler, which writes `target`.

    Raises:
        CompileError: it does not; the message holds what the compiler said.
    """
    done = subprocess.run(
        [*compiler.command, *arguments, "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CompileError(f"{compiler} does not compile {what}:\n{done.stderr.strip()}")


def _build_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder to build in. If this process is killed, the next one that builds
    removes it an hour later."""
    private = private_dir()
    if private is not None:
        store.sweep(private)
    return tempfile.TemporaryDirectory(
        prefix="build-", suffix=store.TEMPORARY, dir=private, ignore_cleanup_errors=True
    )


def digest(*parts: str) -> str:
    """Return what names a build that these went into."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def load_or_build(
    kind: str,
    name: str,
    build: Callable[[Path], None],
    load: Callable[[Path], Built],
    refused: type[Exception],
    what: str,
) -> Built:
    """Load a library of the cache, which is built if it is missing or damaged.

    Args:
        kind: its folder in the cache.
        name: the file's.
        build: makes it, under a path of its argument.
        load: loads a library.
        refused: what `load` raises where the system does not load it, as from a file system that
            is mounted noexec; then another folder is tried.
        what: is built, for messages: "the simulator".

    Raises:
        Exception: what `build` raises.
        BackendUnavailableError: the library is whole, and the system loads it from nowhere.
    """
    refusals: list[Exception] = []
    loaded = load_kept(kind, name, load, refused, refusals)
    if loaded is not None:
        return loaded
    try:
        with store.lock(name), _build_folder() as folder:
            if not refusals:  # another process may have had the lock
                loaded = load_kept(kind, name, load, refused, refusals)
            if loaded is None:
                built = Path(folder, name)
                build(built)
                loaded = _keep_and_load(kind, built, load, refused, refusals, what)
            return loaded
    except OSError as error:
        raise BackendUnavailableError(
            f"{what} cannot be built: {error}; set TMPDIR to a folder that can be written"
        ) from error


def _keep_and_load(
    kind: str,
    built: Path,
    load: Callable[[Path], Built],
    refused: type[Exception],
    refusals: list[Exception],
    what: str,
) -> Built:
    """Keep a library where it can be loaded from, if there is such a place, and load it."""
    content = built.read_bytes()
    for roots in (store.folders(), store.folders()[1:]):
        if store.keep(kind, built.name, content, roots) is not None:
            loaded = load_kept(kind, built.name, load, refused, refusals)
            if loaded is not None:
                return loaded
    try:
        return load(built)  # once it is loaded, the file may go
    except refused as error:
        raise BackendUnavailableError(
            f"{what} was built, but the system does not load it: {error}. It lay in "
            f"{built.parent} and in the cache {env.cache_dir()}: if both are on file systems that "
            f"are mounted noexec, set {env.CACHE_DIR.name} or TMPDIR to a folder on another one"
        ) from error


def load_kept(
    kind: str,
    name: str,
    load: Callable[[Path], Built],
    refused: type[Exception],
    refusals: list[Exception],
) -> Built | None:
    """Return the library, if one is in the cache or the private folder and loads.

    A file is read before it is loaded, as loading half of a library ends the process with SIGBUS.

    Args:
        kind: as in `load_or_build`, like all but the last.
        name: the file's.
        load: loads a library.
        refused: what `load` raises where the system does not load it.
        refusals: gets the reason why a library does not load.
    """
    for root in store.folders():
        path = root / kind / name
        if store.read(path) is None:
            continue
        try:
            loaded = load(path)
        except refused as error:
            refusals.append(error)
            continue
        if refusals:
            notice_once(
                f"refused {kind}",
                f"the system does not load libraries from the cache {env.cache_dir()} "
                f"({refusals[0]}): they are loaded from {root}; set {env.CACHE_DIR.name} to a "
                "folder on a file system that is not mounted noexec",
            )
        return loaded
    return None
