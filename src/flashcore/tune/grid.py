"""List the workloads that the shipped table is measured with, and the table made of their
results."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from flashcore.bench.workloads import Workload
from flashcore.kernels.fwd_sm90.tiles import NUM_SMS
from flashcore.kernels.kernel import Tile
from flashcore.problem import Problem
from flashcore.selection.space import tile_of
from flashcore.selection.tile_table import HEAD_DIMS, Cell, Size, TileTable, class_of
from flashcore.tune.search import Found

_TOKENS, _HIDDEN = 16384, 2048
# head_dims that models rarely have are measured at every other length.
_LENGTHS = {
    dim: (128, 512, 2048, 8192)
    if dim in (96, 192)
    else (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    for dim in HEAD_DIMS
}
_HEADS = (2, 8, 32, 64, 128, 512)
# Row tiles of 64 over SMs: below, a call leaves SMs idle whatever its tile; above, it is as full.
_ROUNDS = (0.4, 12.0)
# A table lists what a problem near the cell could want: tiles at most this much slower.
_LISTED = 1.1


def cells() -> list[Workload]:
    """Return self-attention, full and causal: 128 to 16k tokens, from 2 heads (of all batches) to
    the 16k tokens at a hidden size of 2048 of the benchmark's sweep. In an order by chance, the
    same each time, so that a run that is cut short has seen some of everything."""
    found = []
    for head_dim, lengths in _LENGTHS.items():
        num_heads = _HIDDEN // head_dim
        for seqlen in lengths:
            sizes = [
                (max(1, heads // 16), min(heads, 16))
                for heads in _HEADS
                if _ROUNDS[0] <= heads * -(-seqlen // 64) / NUM_SMS <= _ROUNDS[1]
            ]
            for batch, heads in dict.fromkeys([*sizes, (_TOKENS // seqlen, num_heads)]):
                for causal in (False, True):
                    found.append(
                        Workload("grid", batch, heads, seqlen, head_dim, causal, "bfloat16")
                    )
    random.Random(0).shuffle(found)
    return found


def table_of(about: Mapping[str, Any], results: Sequence[tuple[Problem, Found]]) -> TileTable:
    """Return the table of some results, in an order that does not depend on theirs.

    Args:
        about: see TileTable.
        results: what was searched and found.
    """
    tiles: list[Tile] = []

    def number(tile: Tile) -> int:
        if tile not in tiles:
            tiles.append(tile)
        return tiles.index(tile)

    rows = []
    for problem, found in sorted(results, key=lambda result: _place(*result)):
        limit = _LISTED * found.seconds
        listed = {found.default: found.default_seconds}
        listed |= {plan: seconds for plan, seconds in found.finalists if seconds <= limit}
        rows.append(
            Cell(
                workload=f"{found.workload.name} {found.workload.dtype}",
                kernel=found.default.kernel,
                problem_class=class_of(problem),
                size=Size.of(problem),
                rules=number(tile_of(found.default)),
                seconds={number(tile_of(plan)): seconds for plan, seconds in listed.items()},
            )
        )
    return TileTable(about, tuple(tiles), tuple(rows))


def _place(problem: Problem, found: Found) -> tuple[Any, ...]:
    size = Size.of(problem)
    options = class_of(problem).partition(" ")[2]
    return found.default.kernel, problem.head_dim, options, size.seqlen_q, size.heads, size.seqlen_k
