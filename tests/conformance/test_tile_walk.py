"""The Hopper kernel's schedule: whatever the sizes, every row tile is some block's, once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashcore.codegen import flatten
from flashcore.params_sm90 import num_lead_heads
from flashcore.plan import traits
from flashcore.plan_sm90 import ARCH, KERNEL, Sm90Plan
from flashcore.problem import Problem

Runner = Callable[..., dict[str, Tensor]]

HEADS = (1, 2, 3, 4, 7, 16, 33)
TILES_PER_HEAD = (1, 2, 3, 4, 5, 8, 15)
TAIL_ROUNDS = (0, 1, 2, 3, 9)
CASES = list(itertools.product(HEADS, TILES_PER_HEAD, TAIL_ROUNDS))


def problem_of(heads: int, tiles: int, causal: bool) -> Problem:
    x = torch.empty(1, 1, 128, 64, dtype=torch.float16)
    problem = Problem.from_tensors(x, x, x, causal=causal)
    rows = 64 * tiles
    return dataclasses.replace(problem, num_heads_q=heads, seqlen_q=rows, seqlen_k=rows)


def plan_of(causal: bool) -> Sm90Plan:
    return Sm90Plan(
        kernel=KERNEL,
        arch=ARCH,
        block_m=64,
        block_n=64,
        num_stages=2,
        min_blocks=1,
        **traits(problem_of(1, 2, causal)),
    )


def walk(run: Runner, blocks: int, causal: bool) -> list[tuple[Tensor, Tensor]]:
    """Of every case, how often each tile was visited, and what each block's tiles cost."""
    plan, rows, size = plan_of(causal), [], 0
    for heads, tiles, tail_rounds in CASES:
        asked = dataclasses.replace(plan, tail_rounds=tail_rounds)
        lead = num_lead_heads(problem_of(heads, tiles, causal), asked, blocks)
        rows.append((heads, lead, tiles, size))
        size += heads * tiles
    tensors = {
        "cases": torch.tensor(rows, dtype=torch.int32),
        "visits": torch.zeros(size, dtype=torch.int32),
        "costs": torch.zeros(len(rows), blocks, dtype=torch.int32),
    }
    result = run(
        "tile_walk",
        tensors,
        (),
        counters=("visits", "costs"),
        grid=blocks,
        num_threads=32,
        scalars={"num_cases": len(rows)},
        constants=plan.constants(),
        arch_suffix="a",
    )
    lengths = [heads * tiles for heads, tiles, _ in CASES]
    return list(zip(result["visits"].split(lengths), result["costs"], strict=True))


def test_the_same_text_compiles_for_a_gpu() -> None:
    pytest.importorskip("cuda.core")
    from flashcore.jit import compile_source

    path = Path(__file__).parent / "tile_walk.cuh"
    source = flatten(path, "ptx", constants=plan_of(True).constants())
    assert compile_source(source, 90, "tile_walk", "a").code_bytes > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8, 13])
def test_every_row_tile_is_visited_once(run: Runner, blocks: int, causal: bool) -> None:
    found = walk(run, blocks, causal)
    wrong = [case for case, (visits, _) in zip(CASES, found, strict=True) if (visits != 1).any()]
    assert wrong == []


@pytest.mark.parametrize("blocks", [2, 5, 13])
def test_with_a_tail_no_block_is_much_behind(run: Runner, blocks: int) -> None:
    """By the longest row tile at most, where all pairs cost the same."""
    for (_, tiles, tail_rounds), (_, costs) in zip(CASES, walk(run, blocks, True), strict=True):
        if tiles % 2 == 0 and tail_rounds > 0:
            assert costs.max() <= costs.float().mean() + tiles
