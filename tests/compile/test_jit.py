"""Test the compiler path: cache keys, the on-disk cache, bundles. No GPU; skipped without NVRTC."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from flashcore.compile import codegen, compiler, jit
from flashcore.errors import BackendUnavailableError, CompileError
from flashcore.kernels.fwd_wmma.plan import Plan

SOURCE = """
extern "C" __global__ void copy(float* out, const float* in) {
  __shared__ float tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}
"""


def has_nvrtc() -> bool:
    try:
        compiler.nvrtc_version()
    except BackendUnavailableError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHCORE_BUNDLE", raising=False)
    jit.compile_source.cache_clear()
    return tmp_path


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.bin"))


def forbid_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "compile_uncached", lambda *_: pytest.fail("compiled again"))


def test_resources_come_from_the_compiler(cache: Path) -> None:
    kernel = jit.compile_source(SOURCE, 80, "copy")
    assert kernel.arch == "sm_80"
    assert 4 <= kernel.registers <= 32
    assert kernel.static_smem_bytes == 256
    assert kernel.spill_bytes == 0
    assert kernel.code_bytes % 128 == 0
    assert 0 < kernel.code_bytes < len(kernel.code)


def test_report_is_there_when_nvrtc_has_the_image_in_its_own_cache() -> None:
    first, second = (compiler.compile_uncached(SOURCE, 80, "copy") for _ in range(2))
    assert first.registers == second.registers > 0


def test_second_process_finds_the_kernel_on_disk(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jit.compile_source(SOURCE, 80, "copy")
    jit.compile_source.cache_clear()
    forbid_compiling(monkeypatch)
    assert jit.compile_source(SOURCE, 80, "copy") == first


def test_source_and_architecture_are_the_key(cache: Path) -> None:
    changed = SOURCE.replace("63 -", "62 -")
    keys = {jit.cache_key(SOURCE, 80), jit.cache_key(changed, 80), jit.cache_key(SOURCE, 90)}
    assert len(keys) == 3


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="cut off"),
        pytest.param(lambda data: data[:-9] + b"\0" + data[-8:], id="a byte changed"),
    ],
)
def test_corrupt_entry_is_a_miss(cache: Path, damage: object) -> None:
    first = jit.compile_source(SOURCE, 80, "copy")
    (entry,) = entries(cache)
    healthy = entry.read_bytes()
    entry.write_bytes(damage(healthy))  # type: ignore[operator]
    jit.compile_source.cache_clear()
    assert jit.compile_source(SOURCE, 80, "copy") == first
    assert entry.read_bytes() == healthy


def test_entry_that_stays_corrupt_is_worth_a_warning(cache: Path) -> None:
    for expected in ((), (RuntimeWarning,)):
        jit.compile_source(SOURCE, 80, "copy")
        (entry,) = entries(cache)
        entry.write_bytes(b"damaged")
        jit.compile_source.cache_clear()
        if expected:
            with pytest.warns(RuntimeWarning, match="damaged again"):
                jit.compile_source(SOURCE, 80, "copy")
        else:
            jit.compile_source(SOURCE, 80, "copy")


def test_unwritable_cache_warns_and_compiles(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(blocker))
    with pytest.warns(RuntimeWarning, match="FLASHCORE_CACHE_DIR"):
        assert jit.compile_source(SOURCE, 80, "copy").registers > 0


def _compile_in_process(_: int) -> int:
    return jit.compile_source(SOURCE, 80, "copy").registers


@pytest.mark.thorough  # six seconds
def test_processes_may_race(cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.map(_compile_in_process, range(3))
    assert len(set(results)) == 1
    assert len(entries(cache)) == 1
    assert not list(cache.rglob("*.tmp"))


def test_rejected_source_names_the_kernels_line() -> None:
    with pytest.raises(CompileError, match=r"copy.cu\(5\)"):
        compiler.compile_uncached(SOURCE.replace("__syncthreads", "_syncthreads"), 80, "copy")


@pytest.mark.gpu  # cuda-core asks the driver what PTX it reads
def test_architecture_newer_than_nvrtc_gets_ptx() -> None:
    kernel = compiler.compile_uncached(SOURCE, max(compiler.nvrtc_archs()) + 100, "copy")
    assert kernel.code_type == "ptx"
    assert b".entry copy" in kernel.code


def test_changing_any_header_changes_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("attn_fwd_wmma", 80, "float16", 64, 64, 64, 32, num_stages=2, min_blocks=5)
    source = codegen.generate_source(plan)
    read = codegen._read
    headers = {line.split('"')[1] for line in source.splitlines() if line.startswith("#line ")}
    assert {"fwd_wmma/attn_fwd_wmma.cuh", "ptx/wmma.cuh", "tile/softmax.cuh"} <= headers
    for header in headers:

        def read_changed(path: Path, header: str = header) -> str:
            text = read(path)
            return text + "// changed\n" if path.as_posix().endswith(header) else text

        monkeypatch.setattr(codegen, "_read", read_changed)
        assert codegen.generate_source(plan) != source, header
