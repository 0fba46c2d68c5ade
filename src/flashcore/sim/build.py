"""Kernel source -> shared library for this machine, by any C++20 compiler; cached on disk.

A library is the flattened kernel plus the runtime (runtime/*.cpp), which is compiled once. See
cxx.py.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path

from flashcore import env
from flashcore.codegen import KERNELS_DIR
from flashcore.cxx import (
    Compiler,
    cache_folder,
    compile_file,
    digest,
    find_compiler,
    load_or_build,
)

_WHAT = "the simulator"
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
    compiler = find_compiler(_WHAT)
    key = digest(source, _runtime_text(), compiler.identity, *COMMON_FLAGS, *KERNEL_FLAGS)
    return cache_folder(env.cache_dir() / "sim") / f"kernel-{key}.so"


def _build(source: str, path: Path) -> None:
    compiler = find_compiler(_WHAT)
    runtime = _runtime_object(compiler, path.parent)
    with tempfile.TemporaryDirectory(prefix="flashcore-sim-") as folder:
        unit = Path(folder) / "kernel.cpp"
        unit.write_text(source, encoding="utf-8")
        arguments = [*COMMON_FLAGS, *KERNEL_FLAGS, "-shared", str(unit), str(runtime)]
        compile_file(compiler, arguments, path, "the kernel for the simulator")


@functools.lru_cache(maxsize=256)
def _load(path: Path, source: str) -> ctypes.CDLL:
    return load_or_build(
        path, lambda path: _build(source, path), lambda path: ctypes.CDLL(str(path)), OSError
    )


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
