"""torch's context parallelism on flashcore, unchanged: the script that measures it, as a check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_two_processes_without_a_gpu() -> None:
    """Both rotations, forward and backward, by torch's own ring over aten's flash operators."""
    small = "--checked-seqlen", "64", "--heads", "2", "--head-dim", "16"
    assert "right" in run("--cpu", "--ranks", "2", *small)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gpus(ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are not here")
    assert "right" in run("--check", "--ranks", str(ranks))
