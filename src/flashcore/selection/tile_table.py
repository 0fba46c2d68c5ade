"""Read the tile configurations that ship with flashcore: `data/tiles-sm_90.json`, measured by
`flashcore tune --grid`, and the choice among them.

The file holds cells: a class of problems (options and head_dim), a size, and the seconds of the few
fastest tiles there, the rules' own among them. A problem goes by the nearest cell of its class, if
that is near enough; else by the rules in kernels/fwd_wmma/plan.py and kernels/fwd_sm90/tiles.py.
Where its size differs from the cell's, each tile's time is scaled by the work that falls to the
fullest SM, so that a tile which fits the cell well and the problem badly (192 rows for 100, one row
tile more than SMs) loses there.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashcore.base import env, store
from flashcore.kernels.fwd_sm90.tiles import splits_sectors
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.kernel import Tile
from flashcore.problem import Problem
from flashcore.selection.space import with_tile

_SCHEMA = 1
_FOLDER = Path(__file__).parent.parent / "data"

# head_dims that are measured; another one goes by the next larger, whose tiles fit it too.
HEAD_DIMS = (64, 96, 128, 192, 256)
# Octaves between a problem and a cell: of rounds of row tiles, seqlen_q and seqlen_k together.
MAX_DISTANCE = 1.5
# Below, row tiles leave SMs idle, and above, the last round hardly counts: all sizes are alike.
_ROUNDS = (0.5, 16.0)
_LONGEST = 16384
_ROWS = 64
_CHANGED_MAX = 4096  # plans with tiles that a table keeps
# The rules' tile stays unless another is faster by more than times differ from run to run.
WORTH = 0.98


# Logarithms of rounds of row tiles, seqlen_q and seqlen_k.
Place = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Size:
    """A size says how large a problem is: heads of all batches, and lengths."""

    heads: int
    seqlen_q: int
    seqlen_k: int

    @classmethod
    def of(cls, problem: Problem) -> Size:
        """Return the size of a problem."""
        return cls(problem.batch * problem.num_heads_q, problem.seqlen_q, problem.seqlen_k)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell holds what was measured for one workload.

    Args:
        workload: its name and dtype.
        kernel: the kernel's name.
        problem_class: see `class_of`.
        size: the workload's.
        rules: number of the rules' tile in the table's `tiles`.
        seconds: of a call, by number of the tile; the rules' and the fastest.
    """

    workload: str
    kernel: str
    problem_class: str
    size: Size
    rules: int
    seconds: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class TileTable:
    """A TileTable is a file of measured tiles.

    Args:
        about: gpu (see machine.Gpu), date, command, versions, and kernels: the version of each
            kernel's source that was timed.
        tiles: the fields of a Plan that the problem does not decide.
        cells: what was measured with them.
    """

    about: Mapping[str, Any]
    tiles: tuple[Tile, ...]
    cells: tuple[Cell, ...]
    # By kernel and class, the cells with their places: looked at for each new shape.
    _index: dict[tuple[str, str], list[tuple[Place, Cell]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    # Plans with tiles: lengths come and go, these stay.
    _changed: dict[tuple[Plan, int], Plan | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for cell in self.cells:
            among = self._index.setdefault((cell.kernel, cell.problem_class), [])
            among.append((_place(cell.size, self.num_sms), cell))

    @property
    def num_sms(self) -> int:
        """Return the number of multiprocessors of the GPU that the table was measured on."""
        return int(self.about["gpu"]["num_sms"])

    def nearest(self, kernel: str, problem_class: str, size: Size) -> tuple[float, Cell] | None:
        """Return the cell of a class whose size is nearest, and how many octaves away it is."""
        cells = self._index.get((kernel, problem_class))
        if cells is None:
            return None
        asked = _place(size, self.num_sms)
        return min(((math.dist(asked, place), cell) for place, cell in cells), key=_first)

    def with_tile(self, plan: Plan, number: int) -> Plan | None:
        """Return a plan with a tile of the table; None where that is not legal."""
        key = plan, number
        if key not in self._changed:
            if len(self._changed) >= _CHANGED_MAX:
                self._changed.clear()
            self._changed[key] = with_tile(plan, self.tiles[number])
        return self._changed[key]

    def tiles_for(self, problem: Problem, plan: Plan) -> list[Plan]:
        """Return `plan`, the rules' for a problem, with each tile that a problem of its class may
        get."""
        cells = self._index.get((plan.kernel, class_of(problem)), [])
        numbers = {number for _, cell in cells for number in cell.seconds}
        plans = (self.with_tile(plan, number) for number in sorted(numbers))
        return [found for found in plans if found is not None]


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice is a plan, and the cell of the table that it comes from."""

    plan: Plan
    cell: Cell
    table: TileTable


def options_of(problem: Problem) -> list[str]:
    """Return the options that decide which tiles are fast, in words."""
    parts = []
    if problem.window_left >= 0:
        parts.append("window_left")
    if problem.window_right >= 0:
        parts.append("window_right")
    if problem.softcap:
        parts.append("softcap")
    if problem.mask is not None:
        parts.append("bool mask" if problem.mask.dtype in ("bool", "tree") else "additive mask")
    if problem.varlen != "none":
        parts.append(f"varlen {problem.varlen}")
    if problem.load_bytes < 16:
        parts.append(f"loads of {problem.load_bytes}")
    if problem.cache_dtype:
        parts.append(f"cache {problem.cache_dtype}")
    return parts


def class_of(problem: Problem) -> str:
    """Return the class of problems whose cells are compared: the same options, and head_dims that
    round up to the same of HEAD_DIMS. "" where head_dim and head_dim_v do not, or where reading
    them takes so much more that other tiles are best: no table serves it."""
    dims = {
        next((known for known in HEAD_DIMS if known >= dim), 0)
        for dim in (problem.head_dim, problem.head_dim_v)
    }
    if len(dims) > 1 or 0 in dims or splits_sectors(problem.head_dim, problem.head_dim_v):
        return ""
    return " ".join([f"D{dims.pop()}", *options_of(problem)])


def _place(size: Size, num_sms: int) -> Place:
    rounds = size.heads * -(-size.seqlen_q // _ROWS) / num_sms
    return (
        math.log2(min(max(rounds, _ROUNDS[0]), _ROUNDS[1])),
        math.log2(min(max(size.seqlen_q, 1), _LONGEST)),
        math.log2(min(max(size.seqlen_k, 1), _LONGEST)),
    )


def distance(one: Size, other: Size, num_sms: int) -> float:
    """Return the octaves between two sizes."""
    return math.dist(_place(one, num_sms), _place(other, num_sms))


def _first(pair: tuple[float, Cell]) -> float:
    return pair[0]


def work_of_fullest_sm(tile: Tile, size: Size, num_sms: int, is_causal: bool) -> float:
    """Return the number of scores that the busiest SM computes, those of rows and keys past the
    ends included: what a tile's time grows by from one size to another.

    Args:
        tile: block_m and block_n are read.
        size: of the problem.
        num_sms: of the GPU.
        is_causal: whether half of the keys are hidden; then long and short row tiles are dealt out
            evenly, and the longest one is the least that an SM can have. Rows of a row tile
            past the sequence's end are passed over by 64.
    """
    keys = -(-size.seqlen_k // tile["block_n"]) * tile["block_n"]
    if is_causal:
        rows = size.heads * -(-size.seqlen_q // _ROWS) * _ROWS
        return float(max(tile["block_m"], rows / 2 / num_sms) * keys)
    row_tiles = size.heads * -(-size.seqlen_q // tile["block_m"])
    return float(-(-row_tiles // num_sms) * tile["block_m"] * keys)


def find(problem: Problem, plan: Plan) -> Choice | None:
    """Return what the shipped table says.

    Args:
        problem: what is asked.
        plan: what the rules say, for an architecture.

    Returns:
        The plan with the tile that is fastest by the nearest cell, which may be the rules' own;
        None where no cell is near, with a debug gate, or where FLASHCORE_TUNED is `rules`.
    """
    if plan.gate is not None or problem.is_empty or not env.tile_table():
        return None
    table = read(plan.arch)
    return None if table is None else choose(table, problem, plan)


def choose(table: TileTable, problem: Problem, plan: Plan) -> Choice | None:
    """Return what a table says; see `find`."""
    asked, num_sms = Size.of(problem), table.num_sms
    nearest = table.nearest(plan.kernel, class_of(problem), asked)
    if nearest is None or nearest[0] > MAX_DISTANCE:
        return None
    cell = nearest[1]
    is_causal = problem.window_right >= 0
    expected: dict[Plan, float] = {}
    for number, seconds in cell.seconds.items():
        tile = table.tiles[number]
        changed = table.with_tile(plan, number)
        if changed is not None:
            now = work_of_fullest_sm(tile, asked, num_sms, is_causal)
            expected[changed] = (
                seconds * now / work_of_fullest_sm(tile, cell.size, num_sms, is_causal)
            )
    if not expected:
        return None
    best = min(expected, key=expected.__getitem__)
    if plan in expected and expected[best] > WORTH * expected[plan]:
        best = plan
    return Choice(best, cell, table)


def path_for(arch: int) -> Path:
    """Return the shipped file for an architecture, 90 for sm_90; it need not exist."""
    return _FOLDER / f"tiles-sm_{arch}.json"


@functools.cache
def read(arch: int) -> TileTable | None:
    """Return the shipped table for an architecture, or None."""
    path = path_for(arch)
    return from_json(path.read_text(encoding="utf-8")) if path.exists() else None


def from_json(text: str) -> TileTable:
    """Return the table that `to_json` wrote.

    Raises:
        ValueError: it is of another version of flashcore.
    """
    document = json.loads(text)
    if document.pop("schema", None) != _SCHEMA:
        raise ValueError(f"a table of tiles that is not of schema {_SCHEMA}; measure it anew")
    tiles, rows = document.pop("tiles"), document.pop("cells")
    cells = []
    for row in rows:
        row["seconds"] = {int(number): seconds for number, seconds in row["seconds"].items()}
        cells.append(Cell(**(row | {"size": Size(**row["size"])})))
    return TileTable(document, tuple(tiles), tuple(cells))


def to_json(table: TileTable) -> str:
    """Return a table as text: one line for each tile and each cell, so that a diff can be read."""

    def lines(rows: list[Any]) -> str:
        return "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]"

    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in table.about.items()]
    parts += [f'"tiles": {lines(list(table.tiles))}']
    parts += [f'"cells": {lines([asdict(cell) for cell in table.cells])}']
    return "{\n " + ",\n ".join([f'"schema": {_SCHEMA}', *parts]) + "\n}\n"


def replace_text(path: Path, text: str) -> None:
    """Write a file. A process that reads meanwhile sees the old file or the new one.

    Raises:
        OSError: the folder cannot be written.
    """
    store.write(path.parent, "", path.name, text.encode())
