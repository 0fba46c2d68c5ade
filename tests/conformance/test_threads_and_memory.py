"""Test primitives that move data or order it, against models, in the simulator and on a GPU alike:
what the simulator says holds only as far as its primitives mean what the GPU's mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashcore.compile.codegen import flatten

FOLDER = Path(__file__).parent
DTYPES = ("float16", "bfloat16")

Runner = Callable[..., dict[str, Tensor]]


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        *(("convert", {"Element": dtype}) for dtype in DTYPES),
        ("exchange", {}),
        *(("packets", {"BYTES": size}) for size in (2, 4, 8, 16)),
        *(("async_groups", {"BYTES": size}) for size in (4, 8, 16)),
        ("barriers", {}),
        ("bytes", {}),
        *(("fragments", {"Element": dtype}) for dtype in DTYPES),
        ("functions", {}),
        ("atomics", {}),
        ("maxima", {"NUM_MAXIMA": 3}),
        ("between_blocks", {}),
        ("polls", {}),
    ],
)
def test_the_same_text_compiles_for_a_gpu(kernel: str, constants: dict[str, object]) -> None:
    """Where there is no GPU to run them on, at least the device side's signatures are checked."""
    pytest.importorskip("cuda.core")
    from flashcore.compile.jit import compile_source

    source = flatten(FOLDER / f"{kernel}.cuh", "ptx", constants=constants)
    assert compile_source(source, 80, kernel).code_bytes > 0


def test_shuffles_votes_and_identity(run: Runner) -> None:
    blocks = 3
    values = torch.randn(blocks, 64)
    tensors = {
        "values": values,
        "shuffled": torch.empty(blocks, 32, 64),
        "integers": torch.empty(blocks, 32, 64, dtype=torch.int32),
        "votes": torch.empty(blocks, 33, 64, dtype=torch.int32),
        "uniform": torch.empty(blocks, 64, dtype=torch.int32),
        "identity": torch.empty(blocks, 64, 4, dtype=torch.int32),
    }
    outputs = ("shuffled", "integers", "votes", "uniform", "identity")
    result = run("exchange", tensors, outputs, grid=blocks, num_threads=64)
    thread = torch.arange(64)
    numbers = 2**30 + torch.arange(blocks * 64, dtype=torch.int32).view(blocks, 64)
    for mask in range(32):
        assert torch.equal(result["shuffled"][:, mask], values[:, thread ^ mask])
        assert torch.equal(result["integers"][:, mask], numbers[:, thread ^ mask])
    expected = torch.zeros(33, 64, dtype=torch.int32)
    expected[:32, 32:] = 1
    assert torch.equal(result["votes"], expected.expand(blocks, 33, 64))
    warps = 100 * torch.arange(blocks)[:, None] + thread // 32
    assert torch.equal(result["uniform"].long(), warps)
    for block in range(blocks):
        columns = (torch.full((64,), block), thread, thread // 32, thread % 32)
        assert torch.equal(result["identity"][block].long(), torch.stack(columns, dim=1))


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_packets_move_bytes_unchanged(run: Runner, size: int) -> None:
    src = torch.randint(-(2**15), 2**15, (128, size // 2)).to(torch.int16)
    tensors = {
        "src": src,
        "dst": torch.empty_like(src),
        "single": torch.empty(128, dtype=torch.int16),
    }
    result = run("packets", tensors, ("dst", "single"), num_threads=128, constants={"BYTES": size})
    assert torch.equal(result["dst"], src.flip(0))
    assert torch.equal(result["single"], src[:, 0])


def test_single_bytes_and_what_an_address_is_a_multiple_of(run: Runner) -> None:
    src = torch.rand(128, generator=torch.Generator().manual_seed(1)) < 0.5
    past = torch.empty(128, 2, dtype=torch.int32)
    tensors = {"src": src, "dst": torch.empty_like(src), "past": past}
    result = run("bytes", tensors, ("dst", "past"), num_threads=128)
    assert torch.equal(result["dst"], src.flip(0))
    place = torch.arange(128)
    assert torch.equal(result["past"].long(), torch.stack([place % 4, place % 16], dim=1))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_async_copies_arrive_group_by_group_and_zero_fill(run: Runner, size: int) -> None:
    src = torch.randint(1, 2**15, (3, 64, size // 2)).to(torch.int16)
    tensors = {"src": src, "dst": torch.empty_like(src)}
    for seed in range(5):
        result = run(
            "async_groups",
            tensors,
            ("dst",),
            num_threads=64,
            constants={"BYTES": size},
            seed=seed,
        )
        expected = src.clone()
        expected[:, ::3] = 0  # every third thread's copies are not valid
        assert torch.equal(result["dst"], expected)


def test_barriers_order_memory(run: Runner) -> None:
    tensors = {"rotated": torch.empty(128), "mirrored": torch.empty(128)}
    for seed in range(5):
        result = run("barriers", tensors, ("rotated", "mirrored"), num_threads=128, seed=seed)
        thread = torch.arange(128)
        rotated = (thread // 32 * 32 + (thread + 5) % 32).float()
        assert torch.equal(result["rotated"], rotated)
        assert torch.equal(result["mirrored"], rotated.flip(0))


def test_the_last_block_sees_what_the_others_wrote(run: Runner) -> None:
    blocks, rounds = 40, 20
    tensors = {
        "counter": torch.zeros(rounds, dtype=torch.int32),
        "shares": torch.zeros(rounds, blocks, 64, dtype=torch.int32),
        "sums": torch.zeros(rounds, 64, dtype=torch.int32),
    }
    result = run(
        "between_blocks",
        tensors,
        ("shares", "sums"),
        counters=("counter",),
        shared=("shares",),
        grid=blocks,
        num_threads=64,
        scalars={"rounds": rounds},
    )
    of_thread = torch.arange(63, -1, -1) + torch.arange(rounds)[:, None]
    assert torch.equal(result["sums"], 1000 * sum(range(blocks)) + blocks * of_thread)
    assert not result["counter"].any()


@pytest.mark.parametrize("most_polls", [0, 1, 1000])
def test_who_polls_sees_all_shares_or_says_that_it_left(run: Runner, most_polls: int) -> None:
    blocks = 5
    all_of_them = 1000 * sum(range(blocks)) + blocks * torch.arange(63, -1, -1)
    for seed in range(5):
        tensors = {
            "counter": torch.zeros(1, dtype=torch.int32),
            "shares": torch.zeros(blocks, 64, dtype=torch.int32),
            "sums": torch.zeros(blocks, 64, dtype=torch.int32),
        }
        result = run(
            "polls",
            tensors,
            ("shares", "sums"),
            counters=("counter",),
            shared=("shares",),
            grid=blocks,
            num_threads=64,
            scalars={"most_polls": most_polls},
            seed=seed,
        )
        left = (result["sums"] == -1).all(1)
        assert int(left.sum()) < blocks
        assert (result["sums"][~left] == all_of_them).all()
        assert int(result["counter"]) == blocks + 2**16 * int(left.sum())


def test_atomics_add(run: Runner) -> None:
    tensors = {
        "sums": torch.empty(64),
        "counter": torch.tensor([100, 2**30], dtype=torch.int32),
        "drawn": torch.empty(3, 64, dtype=torch.int32),
    }
    outputs = ("sums", "drawn")
    result = run("atomics", tensors, outputs, counters=("counter",), grid=3, num_threads=64)
    assert torch.equal(result["sums"], 1000.5 + 3.0 * torch.arange(64))
    numbers = 100 + 3 * torch.arange(3 * 64, dtype=torch.int32)
    assert torch.equal(result["drawn"].flatten().sort().values, numbers)
    assert result["counter"].tolist() == [100 + 3 * 3 * 64, 2**30 - int(numbers.sum())]


def test_atomic_maxima(run: Runner) -> None:
    """Numbers of one sign and of both, zeros, infinities and NaN of both signs have a maximum."""
    values = torch.randn(3 * 64, 9)
    values[:, 0] = -values[:, 0].abs() - 1e-30
    values[:, 1] *= 10.0 ** torch.linspace(-40, 38, 3 * 64)
    values[:, 2] = -0.0
    values[70, 3], values[100, 4] = torch.inf, -torch.inf
    values[:, 5] = -torch.inf
    values[50, 6], values[130, 7] = torch.nan, -torch.nan
    values[131, 7] = torch.inf
    values[:, 8] = -values[:, 1].abs()
    largest = torch.full((9,), -torch.inf)
    expected = values.amax(0)
    result = run(
        "maxima",
        {"values": values, "largest": largest},
        (),
        counters=("largest",),
        constants={"NUM_MAXIMA": 9},
        grid=3,
        num_threads=64,
    )["largest"]
    assert torch.equal(result.isnan(), expected.isnan())
    assert expected.isnan().tolist() == [False] * 6 + [True, True, False]
    assert torch.equal(result[~expected.isnan()], expected[~expected.isnan()])
