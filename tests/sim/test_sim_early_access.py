"""A launch may start before the kernels ahead of it have ended; each thread must wait for them
before it touches global memory."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import pytest
import torch

from flashcore.compile.codegen import flatten
from flashcore.launch.descriptors import TensorMap
from flashcore.sim import SimTensor, SimulationError, simulate_source

FAULTS = Path(__file__).parents[1] / "conformance" / "faults_grid.cuh"
SEEDS = range(20)

# Fault of faults_grid.cuh -> tensor that is touched too early.
EXPECTED = {
    0: "in",
    1: "out",
    2: "counter",
    3: "in",
    4: "in",
    5: "in",
    6: "box_in",
    7: "box_out",
}
NO_MISTAKE = 8


class FaultsGridParams(ctypes.Structure):
    _fields_ = (
        ("box_in", TensorMap),
        ("box_out", TensorMap),
        ("in_", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("fault", ctypes.c_int32),
        ("padding", ctypes.c_uint8 * 36),
    )


@functools.cache
def source() -> str:
    return flatten(FAULTS, "host", params="FaultsGridParams")


def launch(fault: int, seed: int, *, starts_early: bool) -> None:
    def box() -> TensorMap:
        return TensorMap(0, 128, 2048, 2048, 64, 16, 1, 1, 64, 16, 2, 128)

    values = torch.zeros(16, 64, dtype=torch.int16)
    tensors = [
        SimTensor("box_in", values, "box_in.base"),
        SimTensor("box_out", values.clone(), "box_out.base", writable=True, complete=False),
        SimTensor("in", torch.zeros(64), "in_"),
        SimTensor("out", torch.zeros(64), "out", writable=True, complete=False),
        SimTensor("counter", torch.zeros(1, dtype=torch.int32), "counter", counter=True),
    ]
    simulate_source(
        source(),
        FaultsGridParams(box(), box(), fault=fault),
        tensors,
        grid=1,
        num_threads=64,
        smem_bytes=2056,
        seed=seed,
        starts_early=starts_early,
    )


@pytest.mark.parametrize("fault", EXPECTED)
def test_an_access_without_a_wait_is_reported(fault: int) -> None:
    lines = FAULTS.read_text(encoding="utf-8").splitlines()
    (line,) = (n for n, text in enumerate(lines, 1) if text.endswith(f"// ALARM {fault}"))
    for seed in SEEDS:
        with pytest.raises(SimulationError, match="grid_dependency_wait") as caught:
            launch(fault, seed, starts_early=True)
        error = caught.value
        assert (error.kind, error.array) == ("early-access", EXPECTED[fault])
        assert (error.file, error.line) == (FAULTS.name, line)


@pytest.mark.parametrize("fault", [*EXPECTED, NO_MISTAKE])
def test_without_an_early_start_the_same_is_healthy(fault: int) -> None:
    for seed in SEEDS:
        launch(fault, seed, starts_early=False)


def test_a_kernel_that_waits_is_healthy() -> None:
    for seed in SEEDS:
        launch(NO_MISTAKE, seed, starts_early=True)


def test_every_fault_is_tried() -> None:
    text = FAULTS.read_text(encoding="utf-8")
    assert {int(n) for n in re.findall(r"case (\d+):", text)} == {*EXPECTED, NO_MISTAKE}
