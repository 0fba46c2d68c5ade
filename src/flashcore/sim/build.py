"""Kernel source -> shared library for this machine, by any C++20 compiler; cached on disk.

A library is the flattened kernel plus the runtime (runtime/*.cpp), which is compiled once. Names in
the cache are hashes of everything that goes in: sources, compiler, flags. Files are written under a
temporary name and renamed, so processes may race.
"""

from __future__ import annotations

import ctypes
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
from dataclasses import dataclass
from pathlib import Path

from flashcore import env
from flashcore.codegen import KERNELS_DIR
from flashcore.errors import BackendUnavailableError, CompileError

RUNTIME_DIR = Path(__file__).parent / "runtime"

# No contraction: a product and a sum are rounded apart on every machine, so results agree.
COMMON_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wno-unknown-pragmas",  # #pragma unroll
    "-Wno-psabi",  # tensor maps are passed by value
)
KERNEL_FLAGS = ("-O2",)
RUNTIME_FLAGS = ("-O3",)

# What the runtime includes of the kernels' host side.
_RUNTIME_HEADERS = ("machine.cuh", "machine_sm90.cuh", "types.cuh")

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
def _find_compiler(explicit: str | None, cxx: str | None, path: str) -> Compiler:
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
        "the simulator needs a C++20 compiler and found none. Looked for "
        f"{env.CXX.name}, CXX, {', '.join(_SEARCH)} on PATH, and the Python package ziglang. "
        "Install one: apt install g++, or pip install ziglang"
    )


def find_compiler() -> Compiler:
    """The compiler that builds kernels for the simulator.

    Returns:
        The first of FLASHCORE_CXX, $CXX, g++, clang++, c++ on PATH, and the package ziglang.

    Raises:
        BackendUnavailableError: there is none; the message says what to install.
    """
    return _find_compiler(env.cxx(), os.environ.get("CXX"), os.environ.get("PATH", ""))


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
        return Path(tempfile.mkdtemp(prefix="flashcore-sim-"))


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


@functools.cache
def _runtime_text() -> str:
    """All that the runtime is made of, as text for the cache key."""
    files = [*sorted(RUNTIME_DIR.glob("*.h")), *sorted(RUNTIME_DIR.glob("*.cpp"))]
    headers = [KERNELS_DIR / "host" / name for name in _RUNTIME_HEADERS]
    return "\0".join(path.read_text(encoding="utf-8") for path in [*files, *headers])


def _runtime_object(compiler: Compiler, folder: Path) -> Path:
    flags = [*COMMON_FLAGS, *RUNTIME_FLAGS]
    path = folder / f"runtime-{digest(_runtime_text(), compiler.identity, *flags)}.o"
    if not path.exists():
        source = RUNTIME_DIR / "runtime.cpp"
        arguments = [*flags, f"-I{KERNELS_DIR}", "-c", str(source)]
        compile_file(compiler, arguments, path, "the simulator's runtime")
    return path


def library_path(source: str) -> Path:
    """Where the library of a kernel source is, or will be, in the cache."""
    compiler = find_compiler()
    key = digest(source, _runtime_text(), compiler.identity, *COMMON_FLAGS, *KERNEL_FLAGS)
    return cache_folder(env.cache_dir() / "sim") / f"kernel-{key}.so"


def _build(source: str, path: Path) -> None:
    compiler = find_compiler()
    runtime = _runtime_object(compiler, path.parent)
    with tempfile.TemporaryDirectory(prefix="flashcore-sim-") as folder:
        unit = Path(folder) / "kernel.cpp"
        unit.write_text(source, encoding="utf-8")
        arguments = [*COMMON_FLAGS, *KERNEL_FLAGS, "-shared", str(unit), str(runtime)]
        compile_file(compiler, arguments, path, "the kernel for the simulator")


@functools.lru_cache(maxsize=256)
def _load(path: Path, source: str) -> ctypes.CDLL:
    if not path.exists():
        _build(source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A damaged file counts as missing.
        path.unlink(missing_ok=True)
        _build(source, path)
        return ctypes.CDLL(str(path))


def load_kernel(source: str) -> ctypes.CDLL:
    """Compiles a flattened kernel source for the simulator, or finds it compiled.

    Args:
        source: from codegen.flatten(..., target="host").

    Returns:
        The library, with fc_sim_run and fc_sim_params_bytes (runtime/abi.h).

    Raises:
        BackendUnavailableError: no compiler.
        CompileError: the compiler rejects the source; its messages name kernel lines.
    """
    return _load(library_path(source), source)
