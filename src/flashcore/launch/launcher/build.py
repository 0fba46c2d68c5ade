"""Compile launcher.cpp and its headers to a Python extension for this Python and this torch; cached
on disk."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from flashcore.base import store
from flashcore.compile.cxx import compile_file, digest, find_compiler, load_kept, load_or_build
from flashcore.errors import BackendUnavailableError, CompileError

SOURCE = Path(__file__).with_name("launcher.cpp")
_WHAT = "the launcher"
KIND = "launcher"  # the folder in the cache
_NAME = "flashcore_launcher"  # as PyInit_... in the source
_TRIAL_TIMEOUT_S = 120  # it takes as long as torch takes to be imported


def _flags() -> list[str]:
    torch_folder = Path(torch.__file__).parent
    libraries = torch_folder / "lib"
    return [
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{torch_folder / 'include'}",
        f"-I{sysconfig.get_path('include')}",
        f"-L{libraries}",
        f"-Wl,-rpath,{libraries}",
    ]


_LIBRARIES = ("-ltorch_python", "-ltorch_cpu", "-lc10")


def check_headers() -> None:
    """Raise unless the headers are there that the launcher includes.

    Raises:
        BackendUnavailableError: they are not; the message says where they come from.
    """
    wanted = {
        "Python's": (Path(sysconfig.get_path("include")) / "Python.h", "apt install python3-dev"),
        "torch's": (
            Path(torch.__file__).parent / "include/torch/csrc/autograd/python_variable.h",
            "reinstall torch from its wheel",
        ),
    }
    for whose, (header, way_out) in wanted.items():
        if not header.is_file():
            raise BackendUnavailableError(f"{whose} header {header} is missing: {way_out}")


def library_name() -> str:
    """Name of the launcher in the cache."""
    abi = str(sysconfig.get_config_var("SOABI"))
    sources = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    key = digest(
        *(path.read_text(encoding="utf-8") for path in sources),
        torch.__version__,
        str(torch.version.git_version),
        abi,
        find_compiler(_WHAT).identity,
        *_flags(),
    )
    return f"launcher-{key}.so"


def _build(path: Path) -> None:
    check_headers()
    compiler, arguments = find_compiler(_WHAT), [*_flags(), str(SOURCE), *_LIBRARIES]
    compile_file(compiler, arguments, path, _WHAT)
    trouble = _trouble_of_trial(path)
    if trouble:
        raise CompileError(f"what {compiler} made of {_WHAT} does not work: {trouble}")


def _trouble_of_trial(path: Path) -> str:
    """Return what goes wrong when another process makes calls by the launcher, see trial.py; empty
    if nothing does. A library of another ABI might end the process that tries it."""
    command = python_command("flashcore.launch.launcher.trial", str(path))
    if command is None:
        return ""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=child_environment(),
            timeout=_TRIAL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"a trial has not ended after {_TRIAL_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"a trial ends with status {done.returncode}"


def python_command(module: str, *arguments: str) -> list[str] | None:
    """Return the command that runs a module by this Python; None where Python is embedded in
    another program."""
    program = sys.executable
    if not program or not Path(program).name.startswith(("python", "pypy")):
        return None
    return [program, "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """Return the environment of a process that finds the same modules, and no GPU."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}


@functools.cache
def load() -> Any:
    """Return the launcher's module: built, which takes some ten seconds, or found built.

    Raises:
        BackendUnavailableError: no compiler, or no headers; or what it made does not load, for it
            is a compiler of another C++ library, say.
        CompileError: the compiler rejects the source.
    """
    return load_or_build(KIND, library_name(), _build, import_library, ImportError, _WHAT)


def load_built() -> Any | None:
    """Return the launcher's module if it is built and loads, else None.

    Raises:
        BackendUnavailableError: there is no compiler, whose builds those in the cache would be.
    """
    return load_kept(KIND, library_name(), import_library, ImportError, [])


def failure_name() -> str:
    """Name of the file in the cache that says why this machine's compiler does not build it."""
    return str(Path(library_name()).with_suffix(".txt"))


def import_library(path: Path) -> Any:
    """Return the module that a library holds.

    Raises:
        ImportError: the system does not load it, or it holds none.
    """
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _step_back() -> None:
    """Have this process, and the compiler that it starts, come last: for a core, and for memory,
    of which the compiler takes a gigabyte."""
    with contextlib.suppress(OSError, AttributeError):  # of this system's kernel, or of Python's os
        os.nice(10)
        Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> int:
    """Build the launcher, or keep the reason why this compiler does not, for background.py."""
    _step_back()
    try:
        load()
    except CompileError as error:
        store.keep(KIND, failure_name(), str(error).encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
