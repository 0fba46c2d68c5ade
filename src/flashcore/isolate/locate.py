"""Compare a gate's output with its model, find the first wrong value, and draw where errors sit.

A place in a matrix is translated to who computed it: BLOCK_M query rows a tile, 16 rows a warp,
and inside a 16x16 fragment the float32 accumulator map of wmma (kernels/prims.cuh, accum_row and
accum_col), so that a wrong value names the lane and the register that held it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashcore.isolate.gate_models import Expected

if TYPE_CHECKING:
    from flashcore.kernels.fwd_wmma.plan import Plan

_FRAGMENT = 16
_MAP_ROWS, _MAP_COLUMNS = 32, 64
_OF_SCORES = ("scores", "transposed")
_OF_KEYS = ("keys", "transposed")  # whose rows are keys
# One character a severity: error / tolerance up to 1, 10, 100, 10000, above; "?" is not a number.
_SEVERITY = ((1.0, "."), (10.0, "-"), (100.0, "+"), (10000.0, "*"), (float("inf"), "#"))
LEGEND = ". right  - up to 10x over tolerance  + 100x  * 10000x  # more  ? NaN or never written"


@dataclass(frozen=True, slots=True)
class Location:
    """Say where one value sits, and which warp, lane and accumulator element of the kernel held it.

    `column` is the key for scores and the output dim for out. For values of a row (row_max,
    row_sum, lse, delta) there is no column; `lane` is then the first of the four lanes that share
    the row. A row of dk or dv is a key: it has an n_block and no m_block.
    """

    batch: int
    head: int
    row: int
    column: int | None
    m_block: int | None
    n_block: int | None
    warp: int
    lane: int
    element: int
    actual: float
    expected: float

    def describe(self) -> str:
        """Return one line for a human."""
        column = "" if self.column is None else f", column {self.column}"
        blocks = {"m_block": self.m_block, "n_block": self.n_block}
        tile = ", ".join(f"{name} {x}" for name, x in blocks.items() if x is not None)
        row = "key" if self.m_block is None else "row"
        return (
            f"batch {self.batch}, head {self.head}, {row} {self.row}{column}: "
            f"got {self.actual:.6g}, expected {self.expected:.6g}\n"
            f"{tile}; warp {self.warp}, lane {self.lane}, accumulator element {self.element}"
        )


@dataclass(frozen=True, slots=True)
class Check:
    """A check compares one output of a gate with its model."""

    name: str
    wrong: int
    total: int
    max_error: float
    max_ratio: float
    first: Location | None = None
    pattern: str = ""
    picture: str = ""

    @property
    def ok(self) -> bool:
        """Return True when no element is off by more than rounding explains."""
        return self.wrong == 0


def compare(
    actual: Tensor, expected: Expected, plan: Plan, kind: str, warps: range | None = None
) -> Check:
    """Compare one output with its model.

    Args:
        actual: what the kernel wrote, shape of expected.value; NaN where it wrote nothing.
        expected: the model.
        plan: tiles, which warps own their rows, and the order of the key tiles.
        kind: "scores" (last dim is the key), "out" (last dim is head_dim_v), "row_tiles" (last dim
            is the key tile), "rows" (last dim is the query row), "keys" (as "out", of keys) or
            "transposed" (scores whose keys are the rows of the kernel's accumulators).
        warps: which own 16 rows each, in the order of the rows; by default the plan's.

    Returns:
        The check; with `first`, `pattern` and `picture` filled in when something is wrong.
    """
    got = actual.double().cpu()
    error = (got - expected.value).abs()
    error = torch.where(got == expected.value, torch.zeros_like(error), error)  # -inf == -inf
    if expected.optional is not None:
        error = torch.where(expected.optional & got.isnan(), torch.zeros_like(error), error)
    ratio = error / expected.tolerance.clamp_min(1e-300)
    bad = ~(error <= expected.tolerance)
    wrong = int(bad.sum())
    finite = error[error.isfinite()]
    max_error = float(finite.max()) if finite.numel() else 0.0
    finite = ratio[ratio.isfinite()]
    max_ratio = float(finite.max()) if finite.numel() else 0.0
    if not wrong:
        return Check(expected.name, 0, bad.numel(), max_error, max_ratio)
    if kind == "transposed":
        bad, ratio, got, value = (x.mT for x in (bad, ratio, got, expected.value))
    elif kind == "rows":
        bad, ratio = bad[..., None], ratio[..., None]
        got, value = got[..., None], expected.value[..., None]
    else:
        value = expected.value
    blocks = plan.block_m, plan.block_n
    if kind in _OF_KEYS:
        blocks = plan.block_n, plan.block_m
    warps = plan.row_warps if warps is None else warps
    finder = _Finder(*blocks, warps, plan.keys_backwards, kind)
    index = finder.first(bad)
    return Check(
        expected.name,
        wrong,
        bad.numel(),
        max_error if bool(error.isfinite().all()) else float("inf"),
        max_ratio,
        finder.location(index, float(got[index]), float(value[index])),
        finder.pattern(bad),
        finder.picture(ratio[index[0], index[1]], index),
    )


@dataclass(frozen=True, slots=True)
class _Finder:
    block_m: int  # of rows, which may be keys
    block_n: int
    warps: range
    keys_backwards: bool
    kind: str

    def first(self, bad: Tensor) -> tuple[int, int, int, int]:
        """Return index of the first bad element in the order in which the kernel computes them."""
        batch, head, row, column = bad.nonzero(as_tuple=True)
        width = 1 << 30 if self.kind in ("out", "keys") else 1
        width = self.block_n if self.kind in _OF_SCORES else width
        step = column // width
        if self.keys_backwards and self.kind in ("scores", "row_tiles"):
            step = -step
        keys = (column, row, step, row // self.block_m, head, batch)
        order = torch.arange(batch.numel())
        for key in keys:  # least significant first: stable sorts compose
            order = order[torch.argsort(key[order], stable=True)]
        best = int(order[0])
        return int(batch[best]), int(head[best]), int(row[best]), int(column[best])

    def location(
        self, index: tuple[int, int, int, int], actual: float, expected: float
    ) -> Location:
        batch, head, row, column = index
        per_element = self.kind in ("out", *_OF_SCORES, *_OF_KEYS)
        lane = (row % 8) * 4 + (column % 8 // 2 if per_element else 0)
        element = 2 * (row % _FRAGMENT // 8)
        if per_element:
            element += column % 2 + 4 * (column % _FRAGMENT // 8)
        block: int | None = row // self.block_m
        n_block = {"scores": column // self.block_n, "row_tiles": column}.get(self.kind)
        if self.kind == "keys":
            block, n_block = None, block
        held_by = self._warp(row), lane, element
        if self.kind == "transposed":
            row, column, block, n_block = column, row, column // self.block_n, block
        column_or_none = column if per_element else None
        return Location(
            batch, head, row, column_or_none, block, n_block, *held_by, actual, expected
        )

    def _warp(self, row: int) -> int:
        return self.warps[row % self.block_m // _FRAGMENT]

    def pattern(self, bad: Tensor) -> str:
        """Return what the wrong elements have in common: warps, accumulator elements, tiles."""
        _, _, rows, columns = bad.nonzero(as_tuple=True)
        traits: list[str] = []
        warps = Counter((rows % self.block_m // _FRAGMENT + self.warps.start).tolist())
        traits.append(_share("warp", warps, len(self.warps)))
        if self.kind in ("out", *_OF_SCORES, *_OF_KEYS):
            elements = columns % 2 + 2 * (rows % _FRAGMENT // 8) + 4 * (columns % _FRAGMENT // 8)
            traits.append(_share("accumulator element", Counter(elements.tolist()), 8))
        if self.kind in ("row_tiles", *_OF_SCORES):
            width = 1 if self.kind == "row_tiles" else self.block_n
            count = (bad.shape[-1] - 1) // width + 1
            name = "m_block" if self.kind == "transposed" else "n_block"
            traits.append(_share(name, Counter((columns // width).tolist()), count))
        m_blocks = -(-bad.shape[-2] // self.block_m)
        name = "n_block" if self.kind in _OF_KEYS else "m_block"
        traits.append(_share(name, Counter((rows // self.block_m).tolist()), m_blocks))
        found = [trait for trait in traits if trait]
        return "; ".join(found) if found else "spread over all warps, elements and tiles"

    def picture(self, ratio: Tensor, index: tuple[int, int, int, int]) -> str:
        """Return a heat map of one head [rows, columns], at most 32 x 64 characters; each shows the
        worst of the elements it stands for. Row labels give the row and its warp."""
        rows, columns = ratio.shape
        step_r, step_c = -(-rows // _MAP_ROWS), -(-columns // _MAP_COLUMNS)
        # Cells that divide 16 keep the borders of fragments and tiles visible.
        step_r, step_c = _power_of_two(step_r), _power_of_two(step_c)
        lines = [
            f"batch {index[0]}, head {index[1]}; one character = {step_r} x {step_c} elements; "
            "rows down, columns across"
        ]
        for top in range(0, rows, step_r):
            cells = ratio[top : top + step_r]
            text = "".join(
                _severity(cells[:, left : left + step_c]) + _gap(left + step_c, columns)
                for left in range(0, columns, step_c)
            )
            if top and top % self.block_m == 0:
                lines.append("")
            label = "key" if self.kind in _OF_KEYS else "row"
            lines.append(f"{label} {top:5d} warp {self._warp(top):2d} |{text}|")
        lines.append(LEGEND)
        return "\n".join(lines)


def _share(name: str, counts: Counter[int], of: int) -> str:
    """Return "" when every member is hit, else the names of those that are."""
    if len(counts) >= of:
        return ""
    members = ", ".join(str(member) for member in sorted(counts)[:8])
    more = ", ..." if len(counts) > 8 else ""
    return f"only {name} {members}{more} of {of}"


def _severity(cells: Tensor) -> str:
    if not bool(cells.isfinite().all()):
        return "?"
    worst = float(cells.max())
    return next(character for limit, character in _SEVERITY if worst <= limit)


def _gap(column: int, columns: int) -> str:
    """Return a blank between fragments."""
    return " " if column % _FRAGMENT == 0 and column < columns else ""


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
