"""Test that what one block wrote another may read only where barriers and an atomic order the two,
and that blocks which wait for each other run in turns and add floats only behind what is complete;
the simulator says so although one block runs at a time."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from flashcore.compile.codegen import flatten
from flashcore.sim import SimTensor, SimulationError, simulate_source

FOLDER = Path(__file__).parents[1] / "conformance"
FAULTS = FOLDER / "faults_between_blocks.cuh"
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


class PollsParams(ctypes.Structure):
    _fields_ = (*Params._fields_[:3], ("most_polls", ctypes.c_int32), ("padding", ctypes.c_int32))


def poll(most_polls: int, seed: int, *replaced: str) -> int:
    """Run blocks that poll; return how many left before all shares were there."""
    source = flatten(FOLDER / "polls.cuh", "host", params="PollsParams")
    if replaced:
        assert source.count(replaced[0]) == 1
        source = source.replace(*replaced)
    counter = torch.zeros(1, dtype=torch.int32)
    shares, sums = torch.zeros(2, BLOCKS, 64, dtype=torch.int32)
    tensors = [
        SimTensor("counter", counter, "counter", counter=True),
        SimTensor("shares", shares, "shares", writable=True, shared=True),
        SimTensor("sums", sums, "sums", writable=True),
    ]
    sizes = {"grid": BLOCKS, "num_threads": 64, "smem_bytes": 64}
    simulate_source(source, PollsParams(most_polls=most_polls), tensors, seed=seed, **sizes)
    left = (sums == -1).all(1)
    assert int(counter) == BLOCKS + 2**16 * int(left.sum())
    return int(left.sum())


def test_blocks_that_poll_let_others_run() -> None:
    """With few looks some leave and some stay, with many nobody leaves."""
    assert {poll(1, seed) for seed in SEEDS} == {0, 1, 2}
    assert {poll(0, seed) for seed in SEEDS} >= {1, 2}
    assert {poll(100, seed) for seed in SEEDS} == {0}


def test_a_look_that_orders_nothing_is_reported() -> None:
    """The value is there, as another block wrote it while this one had halted."""
    look = "seen = gmem_load_acquire(p.counter);"
    relaxed = "gmem_atomic_cas(p.counter, -1, 0); seen = gmem_atomic_add(p.counter, 0);"
    for seed in SEEDS:
        with pytest.raises(SimulationError, match="ordered atomics between blocks") as caught:
            poll(100, seed, look, relaxed)
        assert (caught.value.kind, caught.value.array) == ("race", "shares")


def test_a_counter_is_no_tensor_for_plain_loads() -> None:
    plain = "seen = gmem_load(GmemPtr<const int32_t>{p.counter.address});"
    with pytest.raises(SimulationError, match="without an atomic"):
        poll(100, 0, "seen = gmem_load_acquire(p.counter);", plain)


TURNS = Path(__file__).parents[1] / "conformance" / "turns.cuh"
TURN_BLOCKS = 4
NO_TURN_MISTAKE = "NONE"
# Fault, as turns.cuh counts them, to (alarm, what it says, how the line ends that it names)
TURN_MISTAKES = {
    "NOT_AWAITED": ("atomic-order", "another add may be under way", "own, 1024);"),
    "NO_FENCE": ("missing-fence", "no fence_proxy_async_global", "own, 1024);"),
    "TOLD_EARLY": ("atomic-order", "another add may be under way", "own, 1024);"),
    "TOLD_RELAXED": ("atomic-order", "another add may be under way", "own, 1024);"),
    "WRONG_TURN": ("deadlock", "waits for a counter to be", "rank + 1 : rank);"),
}


class TurnsParams(ctypes.Structure):
    _fields_ = (
        ("addends", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
    )


@functools.cache
def turns_source(fault: str) -> str:
    number = [NO_TURN_MISTAKE, *TURN_MISTAKES].index(fault)
    return flatten(TURNS, "host", constants={"FAULT": number}, params="TurnsParams")


def add_in_turn(fault: str, seed: int, *, are_sums: bool = True) -> torch.Tensor:
    sums = torch.full((256,), torch.nan)
    tensors = [
        SimTensor("addends", torch.ones(TURN_BLOCKS, 256), "addends"),
        SimTensor("sums", sums, "sums", sums=are_sums, counter=not are_sums),
        SimTensor("counters", torch.zeros(2, dtype=torch.int32), "counters", counter=True),
    ]
    simulate_source(
        turns_source(fault),
        TurnsParams(),
        tensors,
        grid=TURN_BLOCKS,
        num_threads=32,
        smem_bytes=1024,
        seed=seed,
    )
    return sums


@pytest.mark.parametrize("fault", TURN_MISTAKES)
def test_an_add_out_of_order_is_reported(fault: str) -> None:
    lines = TURNS.read_text(encoding="utf-8").splitlines()
    kind, message, end = TURN_MISTAKES[fault]
    for seed in SEEDS:
        with pytest.raises(SimulationError, match=message) as caught:
            add_in_turn(fault, seed)
        assert (caught.value.kind, caught.value.file) == (kind, TURNS.name)
        assert lines[caught.value.line - 1].endswith(end)


def test_in_order_it_is_healthy_and_only_where_sums_are_declared() -> None:
    for seed in SEEDS:
        assert add_in_turn(NO_TURN_MISTAKE, seed).tolist() == [TURN_BLOCKS] * 256
    with pytest.raises(SimulationError, match="whose sums have no order"):
        add_in_turn(NO_TURN_MISTAKE, 0, are_sums=False)
