"""Test training over two GPUs: DDP and FSDP2 give the gradients of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[1] / "support" / "distributed_step.py"


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_gpus_give_the_gradients_of_one(way: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "cuda", way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_without_a_gpu(way: str) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "cpu", way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
