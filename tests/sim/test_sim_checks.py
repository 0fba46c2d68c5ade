"""Test every check of the simulator, by a kernel that makes exactly that mistake."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import pytest
import torch

from flashcore.compile.codegen import flatten
from flashcore.sim import SimTensor, SimulationError, simulate_source
from flashcore.sim.report import ALARM_KINDS, SM90_ALARM_KINDS
from flashcore.sim.run import NO_CP_ASYNC

FAULTS = Path(__file__).parents[1] / "conformance" / "faults.cuh"
SEEDS = range(20)

# Fault of faults.cuh -> kind of alarm, array and element (None where the schedule decides).
EXPECTED: dict[int, tuple[str, str, int | None]] = {
    0: ("race", "floats", None),
    1: ("race", "floats", None),
    2: ("race", "floats", None),
    3: ("race", "floats", None),
    4: ("race", "floats", None),
    5: ("race", "tile", None),
    6: ("race", "tile", 5),
    7: ("race", "floats", 40),
    8: ("race", "floats", 0),
    9: ("atomic-order", "floats", 0),
    10: ("uninitialized-read", "floats", 7),
    11: ("out-of-bounds", "floats", 64),
    12: ("out-of-bounds", "floats", -1),
    13: ("out-of-bounds", "too_long", None),
    14: ("misaligned", "halves", 1),
    15: ("misaligned", "tile", 8),
    16: ("misuse", "", None),
    17: ("out-of-bounds", "in", 76),
    18: ("out-of-bounds", "in", -1),
    19: ("out-of-bounds", "in", 17),
    20: ("out-of-bounds", "", None),
    21: ("misaligned", "half", 2),
    22: ("read-only-write", "in", 0),
    23: ("double-write", "out", None),
    24: ("unwritten-output", "out", 5),
    25: ("uninitialized-read", "out", None),
    26: ("async-pending", "halves", None),
    27: ("race", "halves", None),
    28: ("async-pending", "halves", None),
    29: ("async-pending", "halves", None),
    30: ("async-pending", "halves", None),
    31: ("out-of-bounds", "half", 64),
    32: ("race", "halves", None),
    33: ("divergence", "", None),
    34: ("divergence", "", None),
    35: ("divergence", "", None),
    36: ("deadlock", "", None),
    37: ("divergence", "", None),
    38: ("misuse", "", None),
    39: ("race", "tile", 5),
    40: ("race", "tile", 0),
    41: ("race", "floats", 3),
    42: ("race", "counter", 0),
    43: ("race", "counter", 0),
    44: ("race", "out", 0),
    45: ("out-of-bounds", "counter", 1),
    46: ("divergence", "", None),
}


class FaultsParams(ctypes.Structure):
    _fields_ = (
        ("in_", ctypes.c_void_p),
        ("half", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("fault", ctypes.c_int32),
    )


@functools.cache
def source(prefix: str = "") -> str:
    return prefix + "\n" + flatten(FAULTS, "host", params="FaultsParams")


@functools.cache
def marked_lines(fault: int) -> set[int]:
    """Return lines that a report of the fault may name: either side may come second."""
    lines = FAULTS.read_text(encoding="utf-8").splitlines()
    mark = re.compile(rf"//.*\b(ALARM|AGAINST) {fault}\b")
    return {number for number, line in enumerate(lines, 1) if mark.search(line)}


def launch(fault: int, seed: int, source: str, half: torch.Tensor | None = None) -> None:
    half = torch.zeros(64, dtype=torch.int16) if half is None else half
    tensors = [
        SimTensor("in", torch.zeros(4, 20)[:, :16], "in_"),
        SimTensor("half", half, "half"),
        SimTensor("out", torch.zeros(2, 64), "out", writable=True, complete=fault == 24),
        SimTensor("counter", torch.zeros(1, dtype=torch.int32), "counter", counter=True),
    ]
    simulate_source(
        source,
        FaultsParams(fault=fault),
        tensors,
        grid=2,
        num_threads=64,
        smem_bytes=4096,
        seed=seed,
    )


def run_fault(fault: int, seed: int) -> SimulationError:
    with pytest.raises(SimulationError) as caught:
        launch(fault, seed, source())
    return caught.value


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_mistake_is_reported_by_its_check(fault: int) -> None:
    kind, array, element = EXPECTED[fault]
    lines = marked_lines(fault)
    for seed in SEEDS:
        error = run_fault(fault, seed)
        assert (error.kind, error.array) == (kind, array), f"seed {seed}:\n{error}"
        if element is not None:
            assert error.element == element, f"seed {seed}:\n{error}"
        if lines:
            assert error.file == "faults.cuh"
            assert error.line in lines, f"seed {seed}:\n{error}"
            if error.other is not None:
                assert error.other.file == "faults.cuh"
                assert error.other.line in lines, f"seed {seed}:\n{error}"


def test_every_fault_and_every_kind_is_tried() -> None:
    text = FAULTS.read_text(encoding="utf-8")
    assert {int(number) for number in re.findall(r"case (\d+):", text)} == set(EXPECTED)
    kinds = set(ALARM_KINDS) - SM90_ALARM_KINDS
    kinds -= {"counter-left"}  # of whole kernels: the plants that leave a counter
    assert {kind for kind, _, _ in EXPECTED.values()} == kinds


def test_a_report_says_who_where_and_with_which_seed() -> None:
    error = run_fault(7, seed=11)
    assert error.agent is not None
    assert error.other is not None
    agents = {(agent.warp, agent.lane): agent.line for agent in (error.agent, error.other)}
    assert set(agents) == {(0, error.other.lane), (1, 9)} or set(agents) == {
        (0, error.agent.lane),
        (1, 9),
    }
    text = str(error)
    for part in ("race", "floats[40]", "faults.cuh:", "warp 1, lane 9", "seed     11"):
        assert part in text


def test_a_report_of_a_wmma_load_names_the_whole_warp() -> None:
    error = run_fault(6, seed=0)
    assert error.other is not None
    assert error.other.lane is None
    assert "all lanes" in str(error)


def test_a_report_of_a_tensor_gives_its_index() -> None:
    assert run_fault(19, seed=0).place == "in[0, 17]"
    assert run_fault(17, seed=0).place == "in[3, 16]"
    assert run_fault(24, seed=0).place == "out[0, 5]"


def test_a_deadlock_shows_where_every_warp_is() -> None:
    details = run_fault(36, seed=0).details
    assert "warp 0: lanes 0-31 in block_sync at faults.cuh:" in details
    assert "warp 1: lanes 0-31 left" in details


def test_a_seed_fixes_the_run_and_seeds_differ() -> None:
    assert str(run_fault(0, seed=3)) == str(run_fault(0, seed=3))
    assert len({str(run_fault(0, seed)).partition("seed")[0] for seed in SEEDS}) > 5


def test_without_cp_async_a_copy_is_there_at_once_but_still_races() -> None:
    plain = source(NO_CP_ASYNC)
    launch(26, 0, plain)  # reads its own copy before any wait
    launch(30, 0, plain)  # never waits
    with pytest.raises(SimulationError, match="race"):
        launch(27, 0, plain)  # reads another thread's copy without a barrier
    with pytest.raises(SimulationError, match="outside the tensor"):
        launch(31, 0, plain)


def test_a_tensors_alignment_is_the_originals() -> None:
    behind_4_bytes = torch.zeros(66, dtype=torch.int16)[2:]
    launch(21, 0, source(), behind_4_bytes)  # 8 bytes from element 2: now a multiple of 8
    with pytest.raises(SimulationError, match="not a multiple of 8"):
        launch(21, 0, source())
