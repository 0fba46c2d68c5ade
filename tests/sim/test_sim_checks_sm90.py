"""Test every check of Hopper's primitives, by a kernel that makes exactly that mistake."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashcore.compile.codegen import flatten
from flashcore.kernels.tensor_map import TensorMap
from flashcore.sim import SimTensor, SimulationError, simulate_source
from flashcore.sim.report import SM90_ALARM_KINDS

FAULTS = Path(__file__).parents[1] / "conformance" / "faults_sm90.cuh"
FENCES = FAULTS.with_name("fences_sm90.cuh")
SEEDS = range(20)

# Fault of faults_sm90.cuh -> kind of alarm, array and element (None where the schedule decides).
EXPECTED: dict[int, tuple[str, str, int | None]] = {
    0: ("mbarrier", "bars", 2),
    1: ("mbarrier", "bars", 0),
    2: ("mbarrier", "bars", 0),
    3: ("mbarrier", "bars", 1),
    4: ("mbarrier", "bars", 0),
    5: ("mbarrier", "bars", 0),
    6: ("missing-fence", "bars", 2),
    7: ("deadlock", "bars", 0),
    8: ("deadlock", "bars", 1),
    9: ("race", "tile", None),
    10: ("race", "tile", None),
    11: ("race", "over", 0),
    12: ("misuse", "", None),
    13: ("named-barrier", "", None),
    14: ("named-barrier", "", None),
    15: ("named-barrier", "", None),
    16: ("deadlock", "", None),
    17: ("misuse", "", None),
    18: ("race", "tile", None),
    19: ("divergence", "", None),
    20: ("divergence", "", None),
    21: ("divergence", "", None),
    22: ("mbarrier", "bars", 0),
    23: ("named-barrier", "", None),
    24: ("race", "tile", 7),
    25: ("deadlock", "", None),
    30: ("missing-fence", "tile", 0),
    31: ("missing-fence", "tile", None),
    32: ("race", "tile", 5),
    33: ("async-pending", "tile", 0),
    34: ("async-pending", "tile", 0),
    35: ("async-pending", "tile", 0),
    36: ("out-of-bounds", "other", 4159),
    37: ("misaligned", "shifted", 0),
    38: ("missing-fence", "tile", 0),
    39: ("out-of-bounds", "in", 4096),
    40: ("double-write", "out", 0),
    41: ("read-only-write", "in", 0),
    42: ("race", "tile", 9),
    43: ("misaligned", "tile", None),
    44: ("race", "tile", None),
    45: ("race", "tile", 5),
    46: ("missing-fence", "tile", 0),
    47: ("race", "tile", 5),
    48: ("misuse", "", None),
    60: ("wgmma", "", None),
    61: ("wgmma", "", None),
    62: ("wgmma", "", None),
    63: ("wgmma", "", None),
    64: ("wgmma", "", None),
    65: ("wgmma", "", None),
    66: ("async-pending", "", None),
    67: ("wgmma", "", None),
    68: ("wgmma", "", None),
    69: ("wgmma", "", None),
    70: ("divergence", "", None),
    71: ("deadlock", "", None),
    72: ("out-of-bounds", "tile", 4096),
    73: ("misaligned", "tile", 0),
    74: ("misuse", "", None),
    75: ("race", "tile", 3),
    76: ("race", "tile", 3),
    77: ("wgmma", "", None),
    78: ("divergence", "", None),
    79: ("race", "tile", 3),
    80: ("missing-fence", "tile", 0),
    81: ("race", "tile", None),
    82: ("race", "tile", None),
    83: ("wgmma", "", None),
    84: ("race", "tile", None),
}

# What fences_sm90.cuh stores, loads and multiplies, by the number of the case
STORED = {0: "store: reader fences", 3: "store: thread between the two fences"}
LOADED = {5: "load: reader fences"}
MULTIPLIED = {
    10: "wgmma: all threads fence",
    15: "wgmma: one warp fences, a barrier hands it on",
    20: "wgmma: another thread waits for the load, and tells",
}
HEALTHY_FENCES = STORED | LOADED | MULTIPLIED
FENCE_MISTAKES = {
    1: "store: fence before the wait",
    2: "store: no fence",
    4: "store: fence behind the hand-over",
    6: "load: no fence",
    11: "wgmma: fence before the wait",
    12: "wgmma: no fence",
    13: "wgmma: three of four warps fence",
    14: "wgmma: all lanes but one fence",
    16: "wgmma: one warp fences, which no barrier hands on",
}
TOLD_EARLY = 21  # a thread tells of a load before it waits for it


class FaultsSm90Params(ctypes.Structure):
    _fields_ = (
        ("in_", TensorMap),
        ("tall", TensorMap),
        ("out", TensorMap),
        ("fault", ctypes.c_int32),
        ("padding", ctypes.c_uint8 * 60),
    )


class FencesParams(ctypes.Structure):
    _fields_ = (
        ("in_", TensorMap),
        ("out", TensorMap),
        ("number", ctypes.c_int32),
        ("padding", ctypes.c_uint8 * 60),
    )


@functools.cache
def source(kernel: Path, params: str) -> str:
    return flatten(kernel, "host", params=params)


def box(rows: int) -> TensorMap:
    return TensorMap(0, 128, 8192, 8192, 64, rows, 1, 1, 64, 64, 2, 128)


def marked_lines(fault: int) -> set[int]:
    """Return lines that a report of the fault may name: either side may come second."""
    lines = FAULTS.read_text(encoding="utf-8").splitlines()
    mark = re.compile(rf"//.*\b(ALARM|AGAINST) {fault}\b")
    marked = {
        number + line.endswith("on the next line")
        for number, line in enumerate(lines, 1)
        if mark.search(line)
    }
    case = next(i for i, line in enumerate(lines) if line.strip().startswith(f"case {fault}:"))
    if "FILL" in lines[case + 1]:
        marked |= {number for number, line in enumerate(lines, 1) if line.endswith("// FILL")}
    return marked


def run_fault(fault: int, seed: int) -> SimulationError:
    values = torch.zeros(64, 64, dtype=torch.bfloat16)
    out: Tensor = torch.empty_like(values)
    tensors = [
        SimTensor("in", values, ("in_.base", "tall.base")),
        SimTensor("out", out, "out.base", writable=True, complete=False),
    ]
    params = FaultsSm90Params(box(64), box(80), box(64), fault)
    text = source(FAULTS, "FaultsSm90Params")
    with pytest.raises(SimulationError) as caught:
        simulate_source(text, params, tensors, grid=1, num_threads=256, smem_bytes=16408, seed=seed)
    return caught.value


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_mistake_is_reported_by_its_check(fault: int) -> None:
    kind, array, element = EXPECTED[fault]
    lines = marked_lines(fault)
    assert lines
    for seed in SEEDS:
        error = run_fault(fault, seed)
        assert (error.kind, error.array) == (kind, array), f"seed {seed}:\n{error}"
        if element is not None:
            assert error.element == element, f"seed {seed}:\n{error}"
        assert error.file == "faults_sm90.cuh"
        assert error.line in lines, f"seed {seed}:\n{error}"
        if error.other is not None:
            assert error.other.file == "faults_sm90.cuh"
            assert error.other.line in lines, f"seed {seed}:\n{error}"


def test_every_fault_and_every_kind_is_tried() -> None:
    text = FAULTS.read_text(encoding="utf-8")
    assert {int(number) for number in re.findall(r"case (\d+):", text)} == set(EXPECTED)
    elsewhere = {"early-access"}  # test_sim_early_access.py
    assert {kind for kind, _, _ in EXPECTED.values()} >= SM90_ALARM_KINDS - elsewhere


def line_of_fences_with(mark: str) -> int:
    """Return the only line that has a mark in its comment."""
    lines = FENCES.read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if re.search(rf"//.*\b{mark}\b", line))
    return number + lines[number - 1].endswith("on the next line")


def run_fences(number: int, seed: int) -> Tensor:
    """Return what the case stores, if it does: zeros but for the 1 that a thread hands over."""
    values = torch.zeros(64, 64, dtype=torch.bfloat16)
    out = torch.empty_like(values)
    tensors = [
        SimTensor("in", values, "in_.base"),
        SimTensor("out", out, "out.base", writable=True, complete=False),
    ]
    params = FencesParams(box(64), box(64), number)
    text = source(FENCES, "FencesParams")
    simulate_source(text, params, tensors, grid=1, num_threads=256, smem_bytes=8208, seed=seed)
    return out


@pytest.mark.parametrize("number", HEALTHY_FENCES, ids=lambda number: HEALTHY_FENCES[number])
def test_a_fence_counts_for_the_writes_that_its_thread_knows_of(number: int) -> None:
    for seed in SEEDS:
        out = run_fences(number, seed)
        if number in STORED:
            expected = torch.zeros_like(out)
            expected[0, 3] = 1.0
            assert torch.equal(out, expected), f"seed {seed}"


@pytest.mark.parametrize("number", FENCE_MISTAKES, ids=lambda number: FENCE_MISTAKES[number])
def test_a_fence_elsewhere_is_an_alarm(number: int) -> None:
    for seed in SEEDS:
        with pytest.raises(SimulationError) as caught:
            run_fences(number, seed)
        error = caught.value
        found = (error.kind, error.array, error.element, error.line)
        expected = ("missing-fence", "tile", 3, line_of_fences_with(f"ALARM {number}"))
        assert found == expected, f"seed {seed}:\n{error}"
        assert error.other is not None
        assert error.other.line == line_of_fences_with("HANDED OVER"), f"seed {seed}:\n{error}"


def test_every_case_of_fences_is_tried() -> None:
    text = FENCES.read_text(encoding="utf-8")
    cases = [int(number) for number in re.findall(r"case (\d+):", text)]
    assert sorted(cases) == sorted([*HEALTHY_FENCES, *FENCE_MISTAKES, TOLD_EARLY])


def test_who_is_told_of_a_load_before_it_is_there_races_with_it() -> None:
    for seed in SEEDS:
        with pytest.raises(SimulationError) as caught:
            run_fences(TOLD_EARLY, seed)
        error = caught.value
        assert (error.kind, error.array) == ("race", "tile"), f"seed {seed}:\n{error}"
        assert error.other is not None
        lines = {line_of_fences_with(mark) for mark in (f"ALARM {TOLD_EARLY}", "LOADED")}
        assert {error.line, error.other.line} == lines, f"seed {seed}:\n{error}"
