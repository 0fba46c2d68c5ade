"""Test that what one block wrote another may read only where barriers and an atomic order the two;
the simulator says so although its blocks run one after the other."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from flashcore.compile.codegen import flatten
from flashcore.sim import SimTensor, SimulationError, simulate_source

FAULTS = Path(__file__).parents[1] / "conformance" / "faults_between_blocks.cuh"
SEEDS = range(20)
MISTAKES = {
    0: "the count orders nothing",
    1: "written behind the count",
    2: "no barrier between the writes and the count",
    3: "ordered by a counter of each block's own",
}
NO_MISTAKE = 4
BLOCKS = 3


class Params(ctypes.Structure):
    _fields_ = (
        ("counter", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("fault", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    )


@functools.cache
def source() -> str:
    return flatten(FAULTS, "host", params="FaultsBetweenBlocksParams")


def launch(fault: int, seed: int, *, shared: bool = True) -> torch.Tensor:
    sums = torch.zeros(64, dtype=torch.int32)
    shares = torch.zeros(BLOCKS, 64, dtype=torch.int32)
    tensors = [
        SimTensor("counter", torch.zeros(1 + BLOCKS, dtype=torch.int32), "counter", counter=True),
        SimTensor("shares", shares, "shares", writable=True, shared=shared),
        SimTensor("sums", sums, "sums", writable=True),
    ]
    simulate_source(
        source(),
        Params(fault=fault),
        tensors,
        grid=BLOCKS,
        num_threads=64,
        smem_bytes=64,
        seed=seed,
    )
    return sums


@pytest.mark.parametrize("fault", MISTAKES, ids=MISTAKES.get)
def test_a_read_that_nothing_orders_is_reported(fault: int) -> None:
    lines = FAULTS.read_text(encoding="utf-8").splitlines()
    (line,) = (n for n, text in enumerate(lines, 1) if text.endswith("// ALARM"))
    for seed in SEEDS:
        with pytest.raises(
            SimulationError, match="no barrier, or ordered atomics between blocks"
        ) as caught:
            launch(fault, seed)
        error = caught.value
        assert (error.kind, error.array) == ("race", "shares")
        assert (error.file, error.line) == (FAULTS.name, line)
        assert error.other.file == FAULTS.name
        assert "gmem_store(mine, me)" in lines[error.other.line - 1]


def test_in_order_it_is_healthy_and_only_where_the_tensor_is_shared() -> None:
    for seed in SEEDS:
        assert torch.equal(launch(NO_MISTAKE, seed), BLOCKS * torch.arange(63, -1, -1))
    with pytest.raises(SimulationError, match="that another thread writes"):
        launch(NO_MISTAKE, 0, shared=False)
