"""Whatever the sizes of tiles and the window, kernels visit the tiles that have a visible score and
hide the scores that are not visible: the ranges and masks of kernels/tile/band.cuh, of S and of
S^T, against the definition of a window."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashcore.kernels.fwd_wmma.plan import Plan, traits
from flashcore.problem import Problem

Runner = Callable[..., dict[str, Tensor]]

TILES, ROWS, KEYS = 3, 32, 64  # visible scores of 16 lines x 32 columns are looked at together
LENGTHS = ((1, 1), (40, 40), (33, 150), (96, 20), (70, 129))
WINDOWS = ((0, 0), (5, 0), (0, 37), (64, 64), (31, 90))
CASES = [
    (seqlen_q, seqlen_k, offset, left, right)
    for (seqlen_q, seqlen_k), (left, right) in itertools.product(LENGTHS, WINDOWS)
    for offset in (0, seqlen_k - seqlen_q)
]


def visible_scores(case: tuple[int, ...], bounds: tuple[bool, bool], queries: Tensor) -> Tensor:
    """Return which keys the window lets queries see, [queries, TILES * KEYS], of any lengths."""
    _, _, offset, left, right = case
    ahead = torch.arange(TILES * KEYS)[None] - (queries[:, None] + offset)
    visible = torch.ones_like(ahead, dtype=torch.bool)
    if bounds[0]:
        visible &= ahead >= -left
    if bounds[1]:
        visible &= ahead <= right
    return visible


def look(run: Runner, bounds: tuple[bool, bool], num_queries: int = 0) -> dict[str, Tensor]:
    """Return what the kernel says of every case; heads of `num_queries` queries are folded."""
    x = torch.empty(1, 1, 64, 64, dtype=torch.float16)
    problem = Problem.from_tensors(x, x, x, window=(8 if bounds[0] else -1, 8 if bounds[1] else -1))
    plan = Plan(
        kernel="attn_fwd_wmma",
        arch=80,
        block_m=64,
        block_n=64,
        num_stages=1,
        min_blocks=1,
        **traits(problem),
    )
    sizes = {"TILES": TILES, "ROWS": ROWS, "KEYS": KEYS}
    size = (len(CASES), TILES * ROWS, TILES * KEYS)
    tensors = {
        "cases": torch.tensor(CASES, dtype=torch.int32),
        "ranges": torch.full((len(CASES), TILES, 3, 2), -1, dtype=torch.int32),
        "hides": torch.full((len(CASES), TILES, TILES), -1, dtype=torch.int32),
        "seen": torch.full(size, -1, dtype=torch.int32),
        "seen_by": torch.full((size[0], size[2], size[1]), -1, dtype=torch.int32),
    }
    return run(
        "bands",
        tensors,
        ("ranges", "hides", "seen", "seen_by"),
        grid=len(CASES),
        num_threads=32,
        scalars={"num_queries": num_queries},
        constants={**plan.constants(), "FOLDED": num_queries > 0, **sizes},
    )


def tiles_with(found: Tensor, size: int) -> list[int]:
    """Return the first tile of `size` columns that has one of those found, and the one behind the
    last; [0, 0] if there is none."""
    columns = found.nonzero().flatten().tolist()
    return [columns[0] // size, columns[-1] // size + 1] if columns else [0, 0]


@pytest.mark.parametrize(
    "bounds",
    [
        (True, True),
        pytest.param((False, True), marks=pytest.mark.thorough),
        pytest.param((True, False), marks=pytest.mark.thorough),
        pytest.param((False, False), marks=pytest.mark.thorough),
    ],
)
def test_tiles_and_masks_are_those_of_the_window(run: Runner, bounds: tuple[bool, bool]) -> None:
    found = look(run, bounds)
    for i, case in enumerate(CASES):
        seqlen_q, seqlen_k = case[:2]
        window = visible_scores(case, bounds, torch.arange(TILES * ROWS))
        exists = torch.arange(TILES * KEYS) < seqlen_k
        assert torch.equal(found["seen"][i].bool(), window & exists), case
        assert torch.equal(found["seen_by"][i].bool(), window.T), case

        visible = (window & exists)[:seqlen_q]
        tiles = window.unflatten(0, (TILES, ROWS)).unflatten(2, (TILES, KEYS)).all(3).all(1)
        assert torch.equal(found["hides"][i].bool(), ~tiles), case
        for tile in range(TILES):
            keys, unmasked, queries = found["ranges"][i, tile].tolist()
            rows = slice(tile * ROWS, (tile + 1) * ROWS)
            if rows.start < seqlen_q:
                assert keys == tiles_with(visible[rows].any(0), KEYS), (case, tile)
            whole = (window & exists)[rows].all(0).unflatten(0, (TILES, KEYS)).all(1)
            assert [*range(*unmasked)] == whole.nonzero().flatten().tolist(), (case, tile)
            columns = slice(tile * KEYS, (tile + 1) * KEYS)
            assert queries == tiles_with(visible[:, columns].any(1), ROWS), (case, tile)


def test_folded_rows_have_the_bounds_of_their_queries(run: Runner) -> None:
    num_queries = 3
    found = look(run, (True, True), num_queries)["seen"]
    for i, case in enumerate(CASES):
        window = visible_scores(case, (True, True), torch.arange(TILES * ROWS) % num_queries)
        exists = torch.arange(TILES * KEYS) < case[1]
        assert torch.equal(found[i].bool(), window & exists), case
