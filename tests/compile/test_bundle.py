"""Test bundles: what they hold, that one entry is read at a time, what a miss says, recorded
calls."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from parameters import thorough_but
from typer.testing import CliRunner

import flashcore
from flashcore import errors
from flashcore.backends import recording
from flashcore.base import env
from flashcore.cli import app
from flashcore.compile import bundle, compiler, jit
from flashcore.errors import BackendUnavailableError
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.ops import calls as calls_module
from flashcore.problem import Problem
from flashcore.selection import building, compiling, configurations
from flashcore.selection.configurations import serving_plans
from flashcore.selection.select import select_plan

KERNEL = compiler.CompiledKernel("copy", "sm_80", "cubin", b"code", 8, 0, 0, 128)
PLAN = Plan("attn_fwd_wmma", 80, "float16", 64, 64, 64, 32, num_stages=2, min_blocks=5)
compile_source = jit.compile_source.__wrapped__
USUAL_CACHE = env.cache_dir()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a bundle of two kernels, in use beside an empty cache, and a compiler that succeeds."""
    path = tmp_path / "kernels.bundle"
    entries = [(jit.cache_key(text, 80), jit.pack(KERNEL)) for text in ("one", "two")]
    assert bundle.write(path, entries, [80]) == 2
    monkeypatch.setenv(env.BUNDLE.name, str(path))
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    monkeypatch.setattr(errors, "_warned", set())
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(jit, "compile_uncached", lambda *_: KERNEL)
    return path


def test_one_kernel_is_one_entry_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To unpack all of a bundle takes a process most of a second and hundreds of megabytes."""
    names: list[str] = []
    read = zipfile.ZipFile.read

    def counted(self: zipfile.ZipFile, name: str, *rest: Any) -> bytes:
        names.append(name)
        return read(self, name, *rest)

    monkeypatch.setattr(zipfile.ZipFile, "read", counted)
    assert compile_source("one", 80, "copy") == KERNEL
    assert names == [jit.cache_key("one", 80)]


def test_a_forked_process_opens_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that both had open would have one place for both."""
    archive = bundle._opened(path)
    assert bundle._opened(path) is archive
    monkeypatch.setattr(bundle.os, "getpid", lambda: -1)
    assert bundle._opened(path) is not archive


def test_a_bundle_that_is_replaced_is_read_anew(path: Path) -> None:
    assert bundle.read(path, "added") is None
    bundle.write(path, [("added", b"entry"), ("another", b"entry")], [90])
    os.utime(path, (1, 1))  # a disk's clock may be too coarse to tell
    assert bundle.read(path, "added") == b"entry"
    assert bundle.about(path)["archs"] == [90]


DAMAGES = ["missing", "empty", "cut off", "a byte", "a folder", "a text"]


@pytest.mark.parametrize("damage", thorough_but(["cut off", "a byte"], DAMAGES))
def test_a_damaged_bundle_is_an_error_with_a_way_out(
    path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    data = path.read_bytes()
    path.unlink()
    if damage == "a byte":
        key = jit.cache_key("one", 80).encode()
        place = data.index(key) + len(key) + 20  # in the entry itself
        path.write_bytes(data[:place] + b"?" + data[place + 1 :])
    elif damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        parts = {"empty": b"", "cut off": data[: len(data) // 2], "a text": b"kernels" * 99}
        path.write_bytes(parts[damage])
    with pytest.raises(BackendUnavailableError, match=r"FLASHCORE_BUNDLE=.*flashcore build"):
        bundle.check(path)
    if damage != "cut off":
        return  # what the doctor says is always the same
    monkeypatch.setenv(env.CACHE_DIR.name, str(USUAL_CACHE))  # the doctor builds the simulator
    result = CliRunner().invoke(app, ["doctor", "--json"])
    (finding,) = [f for f in json.loads(result.stdout)["findings"] if f["name"] == "bundle"]
    assert finding["state"] == "broken"
    assert result.exit_code == 1


def test_a_miss_says_which_kernel_which_bundle_and_how_to_add_it(path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="does not hold") as caught:
        compile_source("three", 80, "copy", "", PLAN.describe())
    compile_source("three", 80, "copy", "", PLAN.describe())
    assert len(caught) == 1  # now the cache has it
    text = str(caught[0].message)
    assert PLAN.describe() in text
    assert str(path) in text
    assert f"{env.RECORD.name}=calls.json" in text
    assert f"flashcore build --arch sm_80 --calls calls.json --output {path}" in text


def test_a_miss_where_nothing_can_be_compiled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise BackendUnavailableError("NVRTC was not found")

    monkeypatch.setattr(jit, "compile_uncached", missing)
    monkeypatch.setattr(jit, "nvrtc_version", missing)
    with pytest.raises(BackendUnavailableError, match=r"built for sm_80.*--calls.*NVRTC was not"):
        compile_source("one", 90, "copy", "a", "a label")
    assert compile_source("one", 80, "copy") == KERNEL


def test_a_bundle_of_another_version_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "__version__", "9.9")
    assert "flashcore 0" in bundle.describe_miss(path, "a kernel", 80)
    assert "this is 9.9" in bundle.describe_miss(path, "a kernel", 80)


def problem(seqlen_q: int, seqlen_k: int, heads: int, heads_kv: int, dims: Any, **options: Any):
    dim, dim_v = dims if isinstance(dims, tuple) else (dims, dims)
    batch = options.pop("batch", 2)

    def tensor(h: int, s: int, d: int) -> torch.Tensor:
        return torch.empty(batch, h, s, d, dtype=torch.bfloat16)

    mask = options.pop("padding", None) and torch.empty(batch, 1, 1, seqlen_k, dtype=torch.bool)
    return Problem.from_tensors(
        tensor(heads, seqlen_q, dim),
        tensor(heads_kv, seqlen_k, dim),
        tensor(heads_kv, seqlen_k, dim_v),
        mask=mask,
        **options,
    )


# Not the sizes that the list of kernels was made with.
TYPICAL = {
    "prefill": (1999, 1999, 32, 8, 128, {"causal": True}),
    "prefill with a window": (5000, 5000, 32, 8, 128, {"causal": True, "window": (511, 0)}),
    "prefill with a softcap": (3001, 3001, 16, 8, 128, {"causal": True, "softcap": 50.0}),
    "window and softcap": (
        3001,
        3001,
        16,
        8,
        256,
        {"causal": True, "window": (511, 0), "softcap": 50.0},
    ),
    "prefill, padded": (777, 777, 32, 8, 128, {"causal": True, "padding": True}),
    "prefill, padded to 16": (768, 768, 32, 8, 64, {"causal": True, "padding": True}),
    "encoder, padded": (77, 77, 12, 12, 64, {"padding": True}),
    "encoder": (577, 577, 16, 16, 64, {}),
    "decoding": (1, 3333, 32, 8, 128, {"causal": True}),
    "decoding without groups": (1, 3333, 32, 32, 128, {"causal": True}),
    "decoding in a batch": (1, 3333, 32, 8, 128, {"causal": True, "batch": 64}),
    "decoding with a window": (1, 3333, 32, 8, 128, {"causal": True, "window": (511, 0)}),
    "decoding with a softcap": (1, 3333, 16, 8, 256, {"causal": True, "softcap": 50.0}),
    "decoding, padded": (1, 333, 32, 8, 128, {"causal": True, "padding": True}),
    "a few queries": (5, 3333, 32, 8, 128, {"causal": True}),
    "a prompt's next part": (512, 3333, 32, 8, 128, {"causal": True}),
    "latent attention": (1999, 1999, 16, 16, (192, 128), {"causal": True}),
    "latent attention, decoding": (1, 1999, 16, 16, (192, 128), {"causal": True}),
    "diffusion, 40": (4096, 4096, 8, 8, 40, {}),
    "images, 72": (729, 729, 16, 16, 72, {}),
    "images, 88": (257, 257, 16, 16, 88, {}),
    "phi, 80": (1999, 1999, 32, 32, 80, {"causal": True}),
    "phi, 96": (1999, 1999, 32, 32, 96, {"causal": True}),
}


@pytest.mark.parametrize("arch", thorough_but((75,), (75, 80, 90)))
def test_a_bundle_holds_what_serving_asks_for(arch: int) -> None:
    """On sm_90 only some head_dims are looked at, as there are many tiles to choose from."""
    head_dims = (40, (192, 128), 128) if arch == 90 else (*configurations.SERVING_HEAD_DIMS,)
    if arch != 90:
        head_dims += configurations.OTHER_HEAD_DIMS
    dtype = "float16" if arch < 80 else "bfloat16"
    held = set(serving_plans([arch], head_dims, [dtype]))
    missing = []
    for name, (*sizes, dims, options) in TYPICAL.items():
        if dims in head_dims:
            asked = dataclasses.replace(problem(*sizes, dims, **options), dtype=dtype)
            if select_plan(asked, arch).machine_code() not in held:
                missing.append(name)
    assert missing == []


def test_lengths_on_the_device_are_served_too() -> None:
    held = set(serving_plans([80], [128], ["bfloat16"]))
    for varlen in ("packed", "keys"):
        for options in ({}, {"causal": True}):
            asked = dataclasses.replace(
                problem(500, 500, 8, 8, 128, **options), varlen=varlen, total_q=900, total_k=900
            )
            assert select_plan(asked, 80).machine_code() in held


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "calls.json"
    monkeypatch.setenv(env.RECORD.name, str(path))
    monkeypatch.setattr(errors, "_warned", set())
    monkeypatch.setattr(calls_module, "_calls", {})  # what is known is not decided again
    return path


def test_the_calls_of_a_run_are_recorded_once_a_kernel(record: Path) -> None:
    q, k = torch.randn(1, 4, 1, 120).half(), torch.randn(1, 1, 90, 120).half()
    for length in range(80, 90):  # as decoding goes on
        flashcore.attention(q, k[:, :, :length], k[:, :, :length], causal=True)
    assert len(recording.read_calls(record)) == 1
    flashcore.attention(q, k, k, softcap=20.0)
    flashcore.attention(q, k, k, seqlens_k=torch.tensor([70]).int())
    flashcore.attention(q.float(), k.float(), k.float())  # which no kernel serves
    calls = recording.read_calls(record)
    assert [(asked.softcap, asked.varlen) for asked, _ in calls] == [
        (0.0, "none"),
        (20.0, "none"),
        (0.0, "keys"),
    ]
    assert {backend for _, backend in calls} == {"auto"}
    plans = recording.plans_of(calls, [80, 90])
    for asked, _ in calls:
        for arch in (80, 90):
            assert select_plan(asked, arch).machine_code() in plans


def test_processes_add_to_one_record(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 1, 7, 56).half()
    for softcap in (None, 9.0, None):  # each as another process, which knows nothing yet
        monkeypatch.setattr(recording, "_seen", {})
        monkeypatch.setattr(recording, "_needed", {})
        monkeypatch.setattr(calls_module, "_calls", {})
        flashcore.attention(x, x, x, softcap=softcap)
    assert len(recording.read_calls(record)) == 2


@pytest.mark.parametrize("there", ["a folder", "a text"])
def test_a_record_that_cannot_be_written_is_a_warning(record: Path, there: str) -> None:
    if there == "a folder":
        record.mkdir()
    else:
        record.write_text("my notes")
    x = torch.randn(1, 1, 9, 56).half()
    with pytest.warns(RuntimeWarning, match=r"FLASHCORE_RECORD=.*cannot be recorded"):
        flashcore.attention(x, x, x, softcap=11.0)
    assert record.is_dir() or record.read_text() == "my notes"


def test_a_call_may_be_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    call = {"num_heads_q": 8, "seqlen_q": 100, "head_dim": 72, "window": [30, 0], "mask": "padding"}
    path.write_text(json.dumps({"calls": [call]}))
    ((asked, backend),) = recording.read_calls(path)
    assert (asked.head_dim_v, asked.num_heads_kv, asked.seqlen_k, backend) == (72, 8, 100, "auto")
    assert (asked.window_left, asked.mask.dtype) == (30, "bool")
    path.write_text(json.dumps({"calls": [{"head_dimension": 72}]}))
    with pytest.raises(ValueError, match=r"call 1: .*head_dimension"):
        recording.read_calls(path)


class InlinePool:
    """Stand for a pool of processes."""

    submitted = 0

    def __init__(self, max_workers: int, **_: Any) -> None:
        assert max_workers == 3

    def submit(self, function: Any, item: Any) -> Future[Any]:
        type(self).submitted += 1
        future: Future[Any] = Future()
        future.set_result(function(item))
        return future

    def shutdown(self, **_: Any) -> None:
        pass


def test_build_counts_in_a_log_and_compiles_in_parallel(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(env.BUNDLE.name)
    monkeypatch.setattr(compiling, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(building, "compile_unit", lambda unit: jit.pack(KERNEL))
    calls = tmp_path / "calls.json"
    calls.write_text(json.dumps({"calls": [{"head_dim": 8 * n} for n in range(1, 33)]}))
    arguments = ["build", "--arch", "sm_80", "--calls", str(calls), "--only-calls", "--jobs", "3"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "own.bundle")])
    assert result.exit_code == 0, result.output
    assert InlinePool.submitted == 33  # and the element map's check
    assert "Compiling 33 kernels in 3 processes" in result.stderr
    assert "32 of 33, about" in result.stderr
    assert bundle.check(tmp_path / "own.bundle") == 33
    wrong = [
        (["--only-calls"], "--calls"),
        (["--calls", "none.json"], "none.json"),
        (["--head-dim", "64/32/16"], "192/128"),
        (["--jobs", "0"], "--jobs"),
    ]
    for more, message in wrong:
        result = CliRunner().invoke(app, ["build", "--arch", "sm_80", *more])
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_bundle_holds_the_kernel_that_appends_to_caches() -> None:
    units = building.append_units([75, 90], ["float16", "bfloat16"]).values()
    assert {(unit[1], unit[2]) for unit in units} == {
        (75, "append_kvcache"),
        (90, "append_kvcache"),
    }
    assert len(units) == 2 * (4 + 8)  # angles' dtypes and pairs, into caches of 16 and 8 bits


def test_a_full_disk_leaves_the_old_bundle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space"):
        bundle.write(path, [("a", b"b")], [80])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
