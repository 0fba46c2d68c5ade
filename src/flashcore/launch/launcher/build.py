"""Compile launcher.cpp and its headers to a Python extension for this Python and this torch; cached
on disk."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import torch

from flashcore.compile.cxx import compile_file, digest, find_compiler, load_or_build
from flashcore.errors import BackendUnavailableError

SOURCE = Path(__file__).with_name("launcher.cpp")
_WHAT = "the launcher"
KIND = "launcher"  # the folder in the cache
_NAME = "flashcore_launcher"  # as PyInit_... in the source


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


def _check_headers() -> None:
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
    _check_headers()
    arguments = [*_flags(), str(SOURCE), *_LIBRARIES]
    compile_file(find_compiler(_WHAT), arguments, path, _WHAT)


@functools.cache
def load() -> Any:
    """Return the launcher's module: built, which takes some ten seconds, or found built.

    Raises:
        BackendUnavailableError: no compiler, or no headers; or what it made does not load, for it
            is a compiler of another C++ library, say.
        CompileError: the compiler rejects the source.
    """
    return load_or_build(KIND, library_name(), _build, _import, ImportError, _WHAT)


def _import(path: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
