"""Test finding a compiler, and the cache of simulator builds."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashcore.base import env
from flashcore.checks.cases import make_inputs
from flashcore.compile import cxx
from flashcore.compile.codegen import flatten, generate_source
from flashcore.errors import BackendUnavailableError, CompileError
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan
from flashcore.sim import SimTensor, build, simulate_source

BARRIERS = Path(__file__).parents[1] / "conformance" / "barriers.cuh"


class BarriersParams(ctypes.Structure):
    _fields_ = (("rotated", ctypes.c_void_p), ("mirrored", ctypes.c_void_p))


def barriers_source() -> str:
    return flatten(BARRIERS, "host", params="BarriersParams")


def run_barriers(source: str) -> torch.Tensor:
    rotated, mirrored = torch.empty(128), torch.empty(128)
    tensors = [
        SimTensor("rotated", rotated, "rotated", writable=True),
        SimTensor("mirrored", mirrored, "mirrored", writable=True),
    ]
    simulate_source(source, BarriersParams(), tensors, grid=1, num_threads=128, smem_bytes=512)
    return mirrored


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_gives_its_stacks_back() -> None:
    """A process may have 65,530 mappings, and every kernel has a runtime of its own."""
    source = barriers_source() + "// one more kernel of this test's own\n"
    run_barriers(source + "// loaded before\n")
    before = len(Path("/proc/self/maps").read_text().splitlines())
    run_barriers(source)
    after = len(Path("/proc/self/maps").read_text().splitlines())
    assert after - before < 128  # threads of the block: each stack is two mappings


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path))
    return tmp_path / "sim"


@pytest.mark.thorough
def test_a_build_is_found_again_and_a_damaged_one_is_rebuilt(empty_cache: Path) -> None:
    source = barriers_source() + "// a source of this test's own\n"
    expected = run_barriers(source)
    (library,) = empty_cache.glob("kernel-*.so")
    assert library.name == build.library_name(source)
    assert len(list(empty_cache.glob("runtime-*.o"))) == 1
    assert not [path for path in empty_cache.iterdir() if path.suffix not in (".so", ".o")]

    written = library.stat().st_mtime_ns
    build._load.cache_clear()
    assert torch.equal(run_barriers(source), expected)
    assert library.stat().st_mtime_ns == written

    other = source + "// and another\n"
    library = empty_cache / build.library_name(other)
    library.write_bytes(b"damaged")
    assert torch.equal(run_barriers(other), expected)
    assert library.stat().st_size > 1000


def test_the_name_of_a_build_depends_on_everything_that_goes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = barriers_source()
    names = {build.library_name(source), build.library_name(source + "\n")}
    monkeypatch.setattr(build, "KERNEL_FLAGS", ("-O1",))
    names.add(build.library_name(source))
    monkeypatch.setattr(build, "_runtime_text", lambda: "another runtime")
    names.add(build.library_name(source))
    other = cxx.Compiler(("c++",), "another compiler")
    monkeypatch.setattr(build, "find_compiler", lambda what: other)
    names.add(build.library_name(source))
    monkeypatch.setattr(build, "_linker_flags", lambda compiler: ("another linker",))
    names.add(build.library_name(source))
    assert len(names) == 6


def test_gold_links_where_it_is_and_where_the_compiler_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gnu = cxx.Compiler(("/usr/bin/g++", "-m64"), "")
    zig = cxx.Compiler((sys.executable, "-m", "ziglang", "c++"), "")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert build._linker_flags(gnu) == ("-fuse-ld=gold",)
    assert build._linker_flags(zig) == ()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build._linker_flags(gnu) == ()


def test_a_kernel_runs_whichever_linker_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_barriers(barriers_source())
    monkeypatch.setattr(build, "_linker_flags", lambda compiler: ())
    assert torch.equal(run_barriers(barriers_source() + "// by ld\n"), expected)
    monkeypatch.setattr(build, "_linker_flags", lambda compiler: ("-fuse-ld=broken",))
    assert torch.equal(run_barriers(barriers_source() + "// by ld again\n"), expected)


def test_a_kernel_that_does_not_link_says_why(tmp_path: Path) -> None:
    compiler = cxx.find_compiler("the simulator")
    for flags in ((), ("-fuse-ld=broken",)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "_linker_flags", lambda compiler, flags=flags: flags)
            with pytest.raises(CompileError, match=r"no-such-object\.o"):
                build._link(compiler, ["no-such-object.o"], tmp_path / "kernel.so")


def test_a_compiler_that_is_set_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own-c++"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv(env.CXX.name, f"{own} -g")
    assert cxx.find_compiler("the launcher").command == (str(own), "-g")
    monkeypatch.setenv(env.CXX.name, "no-such-compiler")
    with pytest.raises(BackendUnavailableError, match="no-such-compiler"):
        cxx.find_compiler("the launcher")


def test_without_any_compiler_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(env.CXX.name, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cxx._find_compiler.cache_clear()
    with pytest.raises(
        BackendUnavailableError,
        match=r"the launcher needs .* g\+\+, clang\+\+, c\+\+.*pip install ziglang",
    ):
        cxx.find_compiler("the launcher")
    cxx._find_compiler.cache_clear()


def test_a_source_that_does_not_compile_names_the_kernel_line(tmp_path: Path) -> None:
    kernel = tmp_path / "broken.cuh"
    kernel.write_text(
        '#include "prims.cuh"\n'
        "struct BrokenParams { int x; };\n"
        "FC_KERNEL(broken, 32, 1)(const BrokenParams p) {\n"
        "  no_such_primitive(p.x);\n"
        "}\n"
    )
    with pytest.raises(CompileError, match=r"broken\.cuh:4:.*no_such_primitive"):
        build.load_kernel(flatten(kernel, "host", params="BrokenParams"))


def real_source(arch: int) -> str:
    x = make_inputs(Case(causal="lower_right", mask="additive", softcap=3.0))
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, causal="lower_right", softcap=3.0)
    return generate_source(select_plan(problem, arch=arch), "host")


@pytest.mark.thorough
@pytest.mark.parametrize("compiler", ["g++", "clang++", "ziglang"])
def test_kernel_and_runtime_compile_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if compiler == "ziglang":
        if not importlib.util.find_spec("ziglang"):
            pytest.skip("the package ziglang is not installed")
        command = [sys.executable, "-m", "ziglang", "c++"]
    else:
        if not shutil.which(compiler):
            pytest.skip(f"{compiler} is not installed")
        command = [compiler]
    portable, hopper = (tmp_path / f"kernel_{arch}.cpp" for arch in (80, 90))
    portable.write_text(real_source(80))
    hopper.write_text(real_source(90))
    runtime = build.RUNTIME_DIR / "runtime.cpp"
    # The Hopper kernel leaves fields and parameters unused in some of its variants.
    for unit, more in ((portable, ["-Wextra"]), (hopper, []), (runtime, ["-Wextra"])):
        arguments = [*build.COMMON_FLAGS, "-O1", *more, "-Werror", "-c"]
        done = subprocess.run(
            [*command, *arguments, f"-I{build.KERNELS_DIR}", str(unit), "-o", f"{unit.stem}.o"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
