"""Whatever the sizes, the Hopper kernel's schedule makes every row tile some block's, once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashcore.compile.codegen import flatten
from flashcore.kernels.fwd_sm90.plan import ARCH, KERNEL, Sm90Plan
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.problem import Problem

Runner = Callable[..., dict[str, Tensor]]

HEADS = (1, 2, 3, 4, 7, 16, 33)
TILES_PER_HEAD = (1, 2, 3, 4, 5, 8, 15)
HEADS_PER_GROUP = (1, 2, 3, 9, 33)
CASES = [
    case for case in itertools.product(HEADS, TILES_PER_HEAD, HEADS_PER_GROUP) if case[2] <= case[0]
]


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


def walk(run: Runner, blocks: int, causal: bool) -> list[Tensor]:
    """Return, of every case, the place of each tile in the order, from 1 on: [heads, tiles]."""
    plan, rows, size = plan_of(causal), [], 0
    for heads, tiles, heads_per_section in CASES:
        rows.append((heads, heads_per_section, tiles, size))
        size += heads * tiles
    tensors = {
        "cases": torch.tensor(rows, dtype=torch.int32),
        "places": torch.zeros(size, dtype=torch.int32),
        "counters": torch.zeros(len(rows), dtype=torch.int32),
    }
    result = run(
        "tile_walk",
        tensors,
        (),
        counters=("places", "counters"),
        grid=blocks,
        num_threads=32,
        scalars={"num_cases": len(rows)},
        constants=plan.constants(),
        arch_suffix="a",
    )
    # Where a launch would have fewer blocks, the draws are not those of a launch.
    whole = [heads * tiles >= blocks for heads, tiles, _ in CASES]
    assert not result["counters"][torch.tensor(whole)].any()
    places = result["places"].split([heads * tiles for heads, tiles, _ in CASES])
    return [
        found.view(heads, tiles) for found, (heads, tiles, _) in zip(places, CASES, strict=True)
    ]


def test_the_same_text_compiles_for_a_gpu() -> None:
    pytest.importorskip("cuda.core")
    from flashcore.compile.jit import compile_source

    path = Path(__file__).parent / "tile_walk.cuh"
    source = flatten(path, "ptx", constants=plan_of(True).constants())
    assert compile_source(source, 90, "tile_walk", "a").code_bytes > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8, 13])
def test_every_row_tile_is_visited_once(run: Runner, blocks: int, causal: bool) -> None:
    for case, places in zip(CASES, walk(run, blocks, causal), strict=True):
        if places.numel() >= blocks:
            assert places.flatten().sort().values.tolist() == [*range(1, places.numel() + 1)], case


def test_under_a_right_bound_long_tiles_come_first_group_by_group(run: Runner) -> None:
    for (heads, tiles, heads_per_section), places in zip(CASES, walk(run, 1, True), strict=True):
        last_section = heads // heads_per_section - 1
        order = places.flatten().argsort().tolist()
        seen = [(min(i // tiles // heads_per_section, last_section), -(i % tiles)) for i in order]
        assert seen == sorted(seen), (heads, tiles, heads_per_section)
