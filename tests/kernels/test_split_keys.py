"""Test keys of a row tile split over blocks: how many blocks, what a launch is told, and what
explain says. The kernel's results are tested in test_sim_healthy_split.py, and here on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import io
from typing import Any

import pytest
import standin
import torch

import flashcore
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
from flashcore.kernels.fwd_sm90.kernel import SM90
from flashcore.kernels.fwd_sm90.params import num_pieces, num_row_tiles
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.kernels.fwd_sm90.splits import L2_WEIGHT, Reading, adds_up_together, best_sharing
from flashcore.kernels.stream_k import SHARE_WEIGHT, visible_keys
from flashcore.ops.paged import attention_paged
from flashcore.problem import Problem
from flashcore.selection.select import select_plan
from flashcore.selection.space import is_legal, schedules, tiles


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def problem_of(
    batch: int, heads_q: int, heads_kv: int, seqlen_q: int, seqlen_k: int, **options: Any
) -> Problem:
    """Return a problem of head_dim 128; tensors of that size are not needed."""
    q, k = torch.empty(1, heads_q, seqlen_q, 128), torch.empty(1, heads_kv, seqlen_k, 128)
    problem = Problem.from_tensors(q.half(), k.half(), k.half(), **options)
    if batch == 1:
        return problem
    kv_strides = (heads_kv * seqlen_k * 128, *problem.k_strides[1:])
    return dataclasses.replace(
        problem,
        batch=batch,
        q_strides=(heads_q * seqlen_q * 128, *problem.q_strides[1:]),
        k_strides=kv_strides,
        v_strides=kv_strides,
    )


@pytest.mark.parametrize(
    ("shape", "row_tiles", "num_splits"),
    [
        ((1, 32, 8, 1, 2048), 8, 16),  # 128 of 132 SMs
        ((1, 32, 8, 1, 16384), 8, 16),
        ((4, 32, 8, 16, 8192), 32, 4),
        ((1, 32, 32, 1, 2048), 32, 4),
        ((20, 32, 8, 1, 8192), 160, 3),  # four rounds of thirds, not two of wholes
        ((16, 32, 8, 1, 16384), 128, 1),  # as many row tiles as SMs, or nearly
        ((128, 32, 8, 1, 2048), 1024, 1),
        ((1, 8, 8, 128, 32768), 16, 8),
        ((1, 32, 1, 1, 16384), 1, 128),  # whose shares are added up together
    ],
)
def test_splits_fill_the_gpu(shape: tuple[int, ...], row_tiles: int, num_splits: int) -> None:
    problem = problem_of(*shape)
    plan = select_plan(problem, 90)
    assert isinstance(plan, Sm90Plan)
    assert num_row_tiles(problem, plan) == row_tiles
    assert plan.num_splits == num_splits
    assert num_pieces(problem, plan) == row_tiles * num_splits
    assert SM90.num_blocks(problem, plan, 132 * plan.min_blocks) == min(132, row_tiles * num_splits)


@pytest.mark.parametrize("shape", [(1, 8, 8, 512, 512), (1, 8, 8, 64, 512), (2, 16, 4, 2048, 2048)])
def test_short_keys_are_not_split(shape: tuple[int, ...]) -> None:
    assert select_plan(problem_of(*shape), 90).num_splits == 1  # type: ignore[attr-defined]


def test_keys_that_a_window_hides_do_not_count() -> None:
    assert visible_keys(problem_of(1, 8, 2, 1, 4096)) == 4096
    assert visible_keys(problem_of(1, 8, 2, 1, 4096, window=(255, 0))) == 256
    assert visible_keys(problem_of(1, 8, 2, 4, 4096, causal="upper_left")) == 4
    of_device = dataclasses.replace(problem_of(1, 8, 2, 1, 4096, window=(255, 0)), varlen="keys")
    assert visible_keys(of_device) == 4096
    narrow = select_plan(problem_of(1, 32, 8, 1, 16384, window=(255, 0)), 90)
    assert narrow.num_splits == 2  # type: ignore[attr-defined]  # of two key tiles each


def test_adding_up_bounds_the_splits() -> None:
    """Where one SM reads all shares of a row tile, fewer splits pay with many rows."""
    sizes = {"row_tiles": 1, "key_tiles": 64, "key_tile_bytes": 32768, "num_slots": 132}

    def best(rows: int, together: bool) -> int:
        reading = Reading(share_bytes=rows * 520, together=together, **sizes)
        return reading.best_num_splits()

    assert 32 == best(1, together=False) > best(64, together=False) > 8
    assert best(64, together=True) == 32


def sharing(
    folded: int, key_tiles: int, num_heads: int = 1, together: bool = False
) -> tuple[int, int]:
    """Return parts and splits, of one query and head_dim 128."""
    found = best_sharing(
        num_heads=num_heads,
        num_rows=folded,
        folded=folded,
        block_m=64,
        key_tiles=key_tiles,
        key_tile_bytes=32768,
        share_row_bytes=520,
        num_slots=132,
        together=together,
    )
    return found.parts, found.num_splits


def test_many_heads_are_dealt_out_where_adding_up_takes_longest() -> None:
    assert sharing(32, 256) == (4, 33)
    assert sharing(32, 2**16) == (1, 132)  # the keys take longer, and are read once
    assert sharing(32, 256, together=True) == (1, 128)
    assert sharing(4, 256, num_heads=8) == (1, 16)  # few shares
    assert sharing(31, 256)[0] == 1  # a prime, and 31 times the keys is too much
    assert sharing(32, 256, num_heads=132) == (1, 1)  # nothing to add up


def test_many_large_shares_are_added_up_together() -> None:
    """Where that takes less time than one block would, though blocks wait for each other."""
    assert adds_up_together(128, 32 * 520)
    assert adds_up_together(32, 8 * 1032)
    assert not adds_up_together(16, 16 * 520)
    assert not adds_up_together(4, 32 * 520)
    assert not any(adds_up_together(n, 2**30) for n in (0, 1))
    sizes = {"row_tiles": 1, "key_tiles": 264, "key_tile_bytes": 32768, "num_slots": 132}
    of_64_rows = Reading(share_bytes=64 * 520, **sizes)
    assert of_64_rows.adding_up(132) == of_64_rows.adding_up(66)
    alone = Reading(share_bytes=64 * 520, **sizes | {"row_tiles": 2})  # twice as many as run
    assert alone.adding_up(132) == SHARE_WEIGHT * 132 * 64 * 520 > 10 * of_64_rows.adding_up(132)


def test_pieces_are_no_more_than_their_length_asks_for() -> None:
    """313 key tiles are three at a time for 105 blocks as for 132."""
    sizes = {"row_tiles": 1, "key_tile_bytes": 32768, "num_slots": 132}
    assert Reading(key_tiles=313, share_bytes=32 * 520, **sizes).best_num_splits() == 105


def test_a_launch_is_told_who_adds_up() -> None:
    problem = problem_of(1, 32, 1, 1, 16384)
    plan = select_plan(problem, 90)
    assert isinstance(plan, Sm90Plan)
    shapes = SM90.scratch_shapes(problem, plan)
    assert shapes["split_out"][0] == shapes["split_stats"][0] == plan.num_splits
    assert shapes["tile_counter"] == (2,)  # those that wait, and those that have seen all
    addresses = dict.fromkeys(("q", "k", "v", "out"))
    few = dataclasses.replace(plan, num_splits=2)
    told = [SM90.build_params(problem, x, addresses, 132).attn for x in (plan, few)]
    assert [attn.most_polls for attn in told] == [32, 0]


def test_keys_are_shared_through_l2_only_by_what_runs_at_once() -> None:
    sizes = {"key_tiles": 64, "key_tile_bytes": 32768, "share_bytes": 520, "num_slots": 132}
    alone, shared = (Reading(row_tiles=132, readers=n, **sizes).cost(1) for n in (1, 4))
    assert shared == pytest.approx(L2_WEIGHT * alone)
    assert Reading(row_tiles=133, readers=4, **sizes).cost(1) == 2 * alone
    half = Reading(row_tiles=132, readers=2, **sizes).cost(1)  # the first reader's come from memory
    assert half >= alone / 2


def test_a_plan_says_how_many_heads_a_row_tile_has() -> None:
    problem = problem_of(1, 32, 1, 1, 16384)
    plan = select_plan(problem, 90)
    assert (plan.folds_heads, problem.group_size) == (32, 32)
    assert "folded heads:32" in plan.describe()
    assert select_plan(problem, 80).folds_heads == 32  # nothing to add up


def test_packed_sequences_and_gates_are_not_split() -> None:
    problem = problem_of(1, 8, 2, 1, 4096)
    packed = dataclasses.replace(problem, varlen="packed", total_q=1, total_k=4096)
    for plan in (select_plan(packed, 90), select_plan(problem, 90, gate="qk")):
        assert plan.num_splits == 1  # type: ignore[attr-defined]
    split = select_plan(problem, 90)
    assert is_legal(split)
    assert not is_legal(dataclasses.replace(split, varlen="packed"))
    assert not is_legal(dataclasses.replace(split, num_splits=0))
    assert {plan.num_splits for plan in schedules(split)} > {1, 2, 32}  # type: ignore[attr-defined]


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("batch", [1, 100])
def test_every_head_dim_has_several_stages_under_way(head_dim: int, batch: int) -> None:
    problem = dataclasses.replace(
        problem_of(batch, 8, 2, 1, 2048), head_dim=head_dim, head_dim_v=head_dim
    )
    plan = select_plan(problem, 90)
    assert isinstance(plan, Sm90Plan)
    assert plan.num_stages >= 2
    assert plan.smem_bytes * plan.min_blocks <= 232448
    bytes_under_way = plan.min_blocks * plan.num_stages * plan.block_n * 4 * head_dim
    assert bytes_under_way >= min(65536, 4 * 128 * 4 * head_dim)


def test_tuning_keeps_memory_busy_with_other_tiles() -> None:
    base = select_plan(problem_of(1, 32, 8, 1, 4096), 90)
    listed = tiles(base)
    assert len(listed) > 5
    assert {plan.min_blocks for plan in listed} == {1, 2}  # three leave too few registers for O
    q, k = half(1, 32, 1, 64), half(1, 8, 4096, 64)
    narrow = tiles(select_plan(Problem.from_tensors(q, k, k), 90))
    assert {plan.min_blocks for plan in narrow} == {1, 2, 3}
    for plan in listed[1:]:
        keys = plan.num_stages * plan.block_n * plan.min_blocks
        assert plan.num_stages == 2 or keys > base.num_stages * base.block_n - 3 * plan.block_n


def test_explain_says_so() -> None:
    q, k = half(1, 8, 1, 64), half(1, 2, 2048, 64)
    text = str(flashcore.explain(q, k, k, arch=90, file=io.StringIO()))
    assert "splits 8" in text
    assert "the keys of 2 row tiles are split over 8 blocks each" in text
    assert "note      4 heads of q that share one of k and v are rows of one row tile" in text


def test_explain_says_how_many_of_a_group() -> None:
    q, k = half(1, 64, 1, 64), half(1, 1, 16384, 64)
    window = (16000, 0)  # beside which one block adds up
    text = str(flashcore.explain(q, k, k, window=window, arch=90, file=io.StringIO()))
    folded = select_plan(Problem.from_tensors(q, k, k, window=window), 90).folds_heads
    assert 1 < folded < 64
    assert f"{folded} of the 64 heads of q that share one of k and v are rows of one row" in text


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> standin.Machine:
    return standin.install(monkeypatch)


def test_a_launch_is_told_where_shares_go(machine: standin.Machine) -> None:
    q, k = half(2, 8, 1, 64), half(2, 2, 2048, 64)
    for _ in range(2):
        out, lse = flashcore.attention(q, k, k, return_lse=True)
        assert (out.shape, lse.shape) == ((2, 8, 1, 64), (2, 8, 1))
    plan = select_plan(Problem.from_tensors(q, k, k), 90)
    assert isinstance(plan, Sm90Plan)
    for told in machine.driver.launches:
        p = told.params.attn
        assert told.grid == 4 * plan.num_splits == 4 * p.num_splits
        assert (p.num_heads_q, p.seqlen_q, p.num_queries) == (2, 4, 1)
        assert p.tile_counter == machine.counters.data_ptr()
        assert p.split_stats - p.split_out == 4 * plan.num_splits * 2 * 2 * 4 * 64
        assert p.split_out % 16 == 0
    assert machine.driver.launches[-1].params.attn.out == out.data_ptr()


@pytest.mark.parametrize("in_pages", [False, True])
def test_with_lengths_a_launch_is_told_how_to_cut(machine: standin.Machine, in_pages: bool) -> None:
    """Scratch memory is bounded by the blocks: two slots each, and a counter."""
    q, k = half(2, 8, 1, 64), half(2, 2, 16384, 64)
    lengths = torch.tensor([3, 2048], dtype=torch.int32)
    if in_pages:
        table = torch.arange(2048, dtype=torch.int32).view(2, 1024)
        k = half(2048, 2, 16, 64)
        attention_paged(q, k, k, table, lengths)
    else:
        flashcore.attention(q, k, k, seqlens_k=lengths)
    (told,) = machine.driver.launches
    p = told.params.attn
    # Were both as long as can be, 4 row tiles of 128 key tiles, two of which a range has at least;
    # of pages 256 key tiles, and four of them.
    assert (told.grid, p.least_tiles, p.num_splits) == (256, 4 if in_pages else 2, 1)
    assert (p.num_lines, p.heads_of_line, p.num_ranges) == (2, 1, 128)
    assert p.adding_up == pytest.approx(SHARE_WEIGHT * 4 * 66 / ((64 if in_pages else 128) * 64))
    assert p.split_stats - p.split_out == 4 * 2 * 256 * 4 * 64
    assert (p.split_out % 16, p.tile_counter) == (0, machine.counters.data_ptr())


@pytest.mark.thorough
def test_work_is_cut_on_the_device_where_only_that_knows_it() -> None:
    of = functools.partial(dataclasses.replace, varlen="keys")
    few = select_plan(of(problem_of(64, 32, 8, 1, 8192)), 90)
    assert (few.stream_k, few.num_splits) == (True, 1)  # type: ignore[attr-defined]
    assert not is_legal(dataclasses.replace(few, num_splits=2))
    packed = dataclasses.replace(few, varlen="packed")
    assert is_legal(packed)
    assert not is_legal(dataclasses.replace(packed, num_splits=2, stream_k=False))
    assert not is_legal(dataclasses.replace(packed, batch_invariant=True))
    assert "stream-K" in few.describe()
    alone = select_plan(of(problem_of(1, 32, 8, 1, 8192)), 90)  # its own length is what is split
    assert (alone.stream_k, alone.num_splits) == (False, 33)  # type: ignore[attr-defined]
    assert not select_plan(of(problem_of(2, 2, 1, 1, 4096)), 90).stream_k  # type: ignore[attr-defined]
    rows_of_71 = select_plan(of(problem_of(8, 71, 1, 1, 8192)), 90)
    assert rows_of_71.stream_k  # type: ignore[attr-defined]
    for problem in (problem_of(64, 32, 8, 1, 8192), of(problem_of(64, 32, 8, 1, 128))):
        assert not select_plan(problem, 90).stream_k  # type: ignore[attr-defined]
    very_many = of(problem_of(1, 8, 8, 1, 2**19))  # more than one sum may go over
    plan = select_plan(very_many, 90)
    assert (plan.stream_k, plan.num_splits >= 2) == (False, True)  # type: ignore[attr-defined]


def test_a_launch_without_splits_has_no_scratch_memory(machine: standin.Machine) -> None:
    q = half(1, 2, 64, 64)
    flashcore.attention(q, q, q)
    p = machine.driver.launches[0].params.attn
    assert (p.split_out, p.split_stats, p.tile_counter, p.num_splits) == (None, None, None, 1)


def test_the_compile_gate_holds_split_kernels() -> None:
    from flashcore.selection.configurations import configurations

    found = configurations(archs=[90], head_dims=[64], dtypes=["float16"], variants=["decode"])
    plans = [entry.plan for entry in found if isinstance(entry.plan, plan_sm90.Sm90Plan)]
    assert {plan.num_splits for plan in plans} == {1, 2}
    assert [entry.plan.stream_k for entry in found if entry.plan not in plans] == [True]
