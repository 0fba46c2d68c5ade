"""This machine's C++ compiler, and what it builds: for the simulator, and for the launcher.

Names in the cache are hashes of everything that goes in: sources, compiler, flags. Files are
written under a temporary name and renamed, so processes may race.
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
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flashcore import env
from flashcore.errors import BackendUnavailableError, CompileError

Built = TypeVar("Built")

_SEARCH = ("g++", "clang++", "c++")


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: the command's words, and what tells it from another version of itself."""

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
    if importlib.util.find_spec("ziglang"):
        version = importlib.metadata.version("ziglang")
        return Compiler((sys.executable, "-m", "ziglang", "c++"), f"ziglang {version}")
    raise BackendUnavailableError(
        f"{what} needs a C++20 compiler and found none. Looked for "
        f"{env.CXX.name}, CXX, {', '.join(_SEARCH)} on PATH, and the Python package ziglang. "
        "Install one: apt install g++, or pip install ziglang"
    )


def find_compiler(what: str) -> Compiler:
    """The compiler of this machine.

    Args:
        what: needs it, for the error: "the simulator".

    Returns:
        The first of FLASHCORE_CXX, $CXX, g++, clang++, c++ on PATH, and the package ziglang.

    Raises:
        BackendUnavailableError: there is none; the message says what to install.
    """
    return _find_compiler(what, env.cxx(), os.environ.get("CXX"), os.environ.get("PATH", ""))


@functools.cache
def cache_folder(wanted: Path) -> Path:
    """The folder, made if need be; another, after a warning, where nothing can be written there."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        warnings.warn(
            f"what a C++ compiler builds cannot be cached ({error}); set {env.CACHE_DIR.name} to a "
            "writable folder",
            RuntimeWarning,
            stacklevel=3,
        )
        return Path(tempfile.mkdtemp(prefix="flashcore-cxx-"))


def compile_file(compiler: Compiler, arguments: list[str], target: Path, what: str) -> None:
    """Runs the compiler into a temporary name and renames it to `target`."""
    descriptor, temporary = tempfile.mkstemp(
        dir=target.parent, prefix=f"{target.stem}-", suffix=target.suffix
    )
    os.close(descriptor)
    try:
        done = subprocess.run(
            [*compiler.command, *arguments, "-o", temporary],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise CompileError(f"{compiler} does not compile {what}:\n{done.stderr.strip()}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def digest(*parts: str) -> str:
    """What names a build that these went into."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def load_or_build(
    path: Path,
    build: Callable[[Path], None],
    load: Callable[[Path], Built],
    damaged: type[Exception],
) -> Built:
    """What a file of the cache holds.

    Args:
        path: the file.
        build: makes it.
        load: reads it.
        damaged: what `load` raises where the file is; then it counts as missing.

    Raises:
        Exception: what `build` raises, and `load` of a file just built.
    """
    if path.exists():
        try:
            return load(path)
        except damaged:
            path.unlink(missing_ok=True)
    build(path)
    return load(path)
