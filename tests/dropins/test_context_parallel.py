"""torch's context parallelism on flashcore, unchanged: the script that measures it, as a check."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_context_parallel.py"

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"),
    reason="this torch has no door for flash attention",
)


def run(*arguments: str) -> str:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.thorough  # 11 seconds
def test_two_processes_without_a_gpu() -> None:
    """Both rotations, forward and backward, by torch's own ring over aten's flash operators."""
    small = "--checked-seqlen", "64", "--heads", "2", "--head-dim", "16"
    assert "right" in run("--cpu", "--ranks", "2", *small)


def test_a_library_that_fails_is_named_and_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A torch without FlashAttention-2, say; and where the time is over, the rest is left out."""
    spec = importlib.util.spec_from_file_location("bench_context_parallel", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def measure_one(mesh: Any, seqlen: int, library: str, options: Any) -> list[dict[str, Any]]:
        if library == "fa2":
            raise RuntimeError("No available kernel")
        speed = {"tokens_per_second": 2.0, "share_of_ideal": 0.9}
        return [{"rotation": x, **speed} for x in script.ROTATIONS]

    over = iter([False] * 3 + [True] * 3)
    monkeypatch.setattr(script, "measure_one", measure_one)
    monkeypatch.setattr(script, "is_over", lambda started, limit_s: next(over))
    path = tmp_path / "new" / "rings.json"
    options = SimpleNamespace(
        seqlens=[64, 128], limit_s=1.0, json=path, ranks=2, heads=2, head_dim=16
    )
    script.report(script.measure(None, options), options)
    document = json.loads(path.read_text())
    assert {"date", "gpu", "versions", "command"} <= set(document)
    skipped = {(x["seqlen"], x["library"]): x.get("skipped") for x in document["rows"]}
    late = "the time was over"
    assert skipped == {
        (64, "flashcore"): None, (64, "cudnn"): None, (64, "fa2"): "No available kernel",
        (128, "flashcore"): late, (128, "cudnn"): late, (128, "fa2"): late,
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gpus(ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are not here")
    assert "right" in run("--check", "--ranks", str(ranks))
