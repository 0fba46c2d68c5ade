"""Compile kernel source to a shared library for this machine, by any C++20 compiler; cached on
disk.

A library is the flattened kernel plus the runtime (runtime/*.cpp), which is compiled once. See
compile/cxx.py.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
from pathlib import Path

from flashcore.base import env, store
from flashcore.compile.codegen import KERNELS_DIR
from flashcore.compile.cxx import (
    Compiler,
    compile_file,
    digest,
    find_compiler,
    load_or_build,
)
from flashcore.errors import CompileError

_WHAT = "the simulator"
_KERNEL = "the kernel for the simulator"
KIND = "sim"  # the folder in the cache
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
# A kernel is compiled for a few runs, and in them the runtime is what takes time: with -Og a build
# takes a quarter longer, and a run a fifth less, which pays from ten runs on.
KERNEL_FLAGS = ("-O0",)
RUNTIME_FLAGS = ("-O3",)

# Headers of the kernels' host side that the runtime includes.
_RUNTIME_HEADERS = ("simulator/machine.cuh", "simulator/machine_sm90.cuh", "types.cuh")


@functools.cache
def _runtime_text() -> str:
    """Return all that the runtime is made of, as text for the cache key."""
    files = [*sorted(RUNTIME_DIR.rglob("*.h")), *sorted(RUNTIME_DIR.rglob("*.cpp"))]
    headers = [KERNELS_DIR / "host" / name for name in _RUNTIME_HEADERS]
    return "\0".join(path.read_text(encoding="utf-8") for path in [*files, *headers])


def _runtime_object(compiler: Compiler, folder: Path) -> Path:
    """Return the runtime, compiled or found compiled, as an object file in a folder."""
    flags = [*COMMON_FLAGS, *RUNTIME_FLAGS]
    name = f"runtime-{digest(_runtime_text(), compiler.identity, *flags)}.o"
    path = folder / "runtime.o"
    content = store.find(KIND, name)
    if content is None:
        with store.lock(name):
            content = store.find(KIND, name)  # another process may have had the lock
            if content is None:
                source = RUNTIME_DIR / "runtime.cpp"
                arguments = [*flags, f"-I{KERNELS_DIR}", "-c", str(source)]
                compile_file(compiler, arguments, path, "the simulator's runtime")
                store.keep(KIND, name, path.read_bytes())
                return path
    path.write_bytes(content)
    return path


def _linker_flags(compiler: Compiler) -> tuple[str, ...]:
    """Return what makes the compiler take gold, if there is one: it links a kernel in 0.01 s, and
    GNU ld, which reads the whole of libstdc++, in 0.06 s, a sixth of a build."""
    takes_it = Path(compiler.command[0]).name in ("g++", "clang++")
    return ("-fuse-ld=gold",) if takes_it and shutil.which("ld.gold") else ()


def library_name(source: str) -> str:
    """Name of the library of a kernel source in the cache."""
    compiler = find_compiler(_WHAT)
    flags = (*COMMON_FLAGS, *KERNEL_FLAGS, *_linker_flags(compiler))
    return f"kernel-{digest(source, _runtime_text(), compiler.identity, *flags)}.so"


def _build(source: str, path: Path) -> None:
    compiler = find_compiler(_WHAT)
    runtime = _runtime_object(compiler, path.parent)
    unit = path.with_name("kernel.cpp")
    unit.write_text(source, encoding="utf-8")
    compiled = path.with_name("kernel.o")
    compile_file(compiler, [*COMMON_FLAGS, *KERNEL_FLAGS, "-c", str(unit)], compiled, _KERNEL)
    _link(compiler, [str(compiled), str(runtime)], path)


def _link(compiler: Compiler, objects: list[str], path: Path) -> None:
    """Link by gold, or by what the compiler takes itself: gold stops at a file that GNU ld passes
    over, such as a link of a compiler's folder that leads nowhere."""
    flags = _linker_flags(compiler)
    try:
        compile_file(compiler, [*flags, "-shared", *objects], path, _KERNEL)
    except CompileError:
        if not flags:
            raise
        compile_file(compiler, ["-shared", *objects], path, _KERNEL)


@functools.lru_cache(maxsize=256)
def _load(name: str, source: str, cache_dir: Path) -> ctypes.CDLL:
    """Load a library; `cache_dir` is where it comes from: tests and notebooks change it."""
    return load_or_build(
        KIND,
        name,
        lambda path: _build(source, path),
        lambda path: ctypes.CDLL(str(path)),
        OSError,
        _WHAT,
    )


def load_kernel(source: str) -> ctypes.CDLL:
    """Compile a flattened kernel source for the simulator, or find it compiled.

    Args:
        source: from codegen.flatten(..., target="host").

    Returns:
        The library, with fc_sim_run and fc_sim_params_bytes (runtime/abi.h).

    Raises:
        BackendUnavailableError: no compiler, or no folder that code can be loaded from.
        CompileError: the compiler rejects the source; its messages name kernel lines.
    """
    return _load(library_name(source), source, env.cache_dir())
