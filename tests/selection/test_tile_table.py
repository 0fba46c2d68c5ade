"""Test the tiles that ship: the cell that a problem goes by, and the choice where their sizes
differ."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch

import flashcore
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection import tile_table, tuned
from flashcore.selection.compile_gate import checked
from flashcore.selection.configurations import configurations
from flashcore.selection.select import candidates, select_plan
from flashcore.selection.space import tile_of, with_tile
from flashcore.selection.tile_table import Cell, Size, TileTable

SMS = 132


def problem(
    seqlen: int = 4096,
    heads: int = 64,
    head_dim: int = 128,
    *,
    seqlen_k: int | None = None,
    head_dim_v: int | None = None,
    **options: Any,
) -> Problem:
    """Return a problem, causal unless told otherwise, of a GPU that nobody has."""
    options = {"causal": True} | options
    q = torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16).expand(1, heads, seqlen, -1)
    k = torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16)
    k = k.expand(1, heads, seqlen_k or seqlen, -1)
    described = Problem.from_tensors(q, k, k, **options)
    strides = (heads * seqlen * head_dim, seqlen * head_dim, head_dim)
    contiguous = dict.fromkeys(("q_strides", "k_strides", "v_strides"), strides)
    return dataclasses.replace(
        described, device="cuda", arch=90, head_dim_v=head_dim_v or head_dim, **contiguous
    )


def plan_with(asked: Problem, block_m: int, block_n: int, **others: Any) -> Plan:
    """Return the rules' plan with other tiles, of the plainest kind."""
    plain = {"num_stages": 2, "min_blocks": 1, "ping_pong": False, "key_slices": 1}
    sizes = {"block_m": block_m, "block_n": block_n}
    return dataclasses.replace(candidates(asked)[0], **sizes, **(plain | others))


def table_of(*cells: tuple[Problem, dict[Plan, float]], **about: Any) -> TileTable:
    """Return a table of problems with the seconds of their plans; the first is the rules'."""
    tiles: list[Any] = []
    rows = []
    for asked, seconds in cells:
        for plan in seconds:
            if tile_of(plan) not in tiles:
                tiles.append(tile_of(plan))
        numbered = {tiles.index(tile_of(plan)): value for plan, value in seconds.items()}
        kernel, name = next(iter(seconds)).kernel, asked.describe()
        where = tile_table.class_of(asked), Size.of(asked)
        rows.append(Cell(name, kernel, *where, next(iter(numbered)), numbered))
    conditions = {
        "gpu": {"name": "NVIDIA H999", "num_sms": SMS},
        "date": "2026-01-02T03:04:05+00:00",
        "kernels": {"attn_fwd_sm90": tuned.kernel_version("attn_fwd_sm90")},
    }
    return TileTable(conditions | about, tuple(tiles), tuple(rows))


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a table the one that ships."""

    def ship(*cells: tuple[Problem, dict[Plan, float]], **about: Any) -> TileTable:
        table = table_of(*cells, **about)
        monkeypatch.setattr(tile_table, "read", lambda arch: table if arch == 90 else None)
        return table

    monkeypatch.setattr(tuned, "read", lambda path: [])
    return ship


ASKED = problem()
RULES, OTHER = candidates(ASKED)[0], plan_with(ASKED, 64, 80, min_blocks=2)


def test_the_fastest_tile_of_the_cell_is_chosen(ship: Any) -> None:
    assert OTHER != RULES
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}))
    assert select_plan(ASKED) == OTHER
    near = problem(seqlen=5000, heads=70)
    assert select_plan(near) == with_tile(candidates(near)[0], tile_of(OTHER))
    half = dataclasses.replace(ASKED, dtype="float16")
    assert select_plan(half) == dataclasses.replace(OTHER, dtype="float16")
    ship((ASKED, {RULES: 1e-3, OTHER: 2e-3}))
    assert select_plan(ASKED) == RULES
    ship((ASKED, {RULES: 1e-3, OTHER: 0.99e-3}))  # within what times differ from run to run
    assert select_plan(ASKED) == RULES


@pytest.mark.parametrize(
    "other",
    [
        problem(causal=False),
        problem(window=(100, 0)),
        problem(softcap=9.0),
        problem(head_dim=64),
        problem(head_dim=96),
        problem(head_dim_v=64),
        problem(head_dim=256, head_dim_v=8),
        problem(head_dim=120, head_dim_v=120),  # rows that start inside of a sector
        dataclasses.replace(problem(), varlen="keys"),
        dataclasses.replace(problem(), load_bytes=4),
        problem(seqlen=1, seqlen_k=4096, causal=False),
        problem(seqlen=256),  # far away, for MAX_DISTANCE
        problem(seqlen_k=512, causal=False),
        problem(seqlen=0),
    ],
    ids=lambda asked: f"{tile_table.class_of(asked)} {Size.of(asked)}",
)
def test_other_classes_and_sizes_go_by_the_rules(other: Problem, ship: Any) -> None:
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}))
    assert select_plan(other) == candidates(other)[0]


def test_the_nearest_cell_counts(ship: Any) -> None:
    short = problem(seqlen=1024)
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}), (short, {RULES: 1e-3, OTHER: 2e-3}))
    assert select_plan(problem(seqlen=3000)) == OTHER
    assert select_plan(problem(seqlen=1500)) == RULES
    # Where all SMs have much to do, more heads change nothing, nor do still longer sequences.
    assert select_plan(problem(heads=4096)) == OTHER
    assert tile_table.distance(Size(64, 16384, 16384), Size(640, 99999, 99999), SMS) == 0.0


def test_narrower_heads_take_the_tiles_of_the_next_wider(ship: Any) -> None:
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}))
    narrow = problem(head_dim=112)
    assert select_plan(narrow) == dataclasses.replace(OTHER, head_dim=112, head_dim_v=112)


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        (problem(192, 132, causal=False), 192),  # the cell itself
        (problem(256, 132, causal=False), 128),  # 192 rows would be two row tiles, half empty
        (problem(192, 140, causal=False), 128),  # eight SMs would have twice as much as others
    ],
    ids=["cell", "longer", "more"],
)
def test_a_tile_that_fits_the_cell_only_is_not_chosen(asked: Problem, rows: int, ship: Any) -> None:
    cell = problem(192, 132, causal=False)
    tall, low = plan_with(cell, 192, 80), plan_with(cell, 128, 80)
    ship((cell, {low: 1.2e-3, tall: 1e-3}))
    assert select_plan(asked).block_m == rows


def test_the_work_of_the_fullest_sm() -> None:
    tile = {"block_m": 128, "block_n": 96}
    keys = 3 * 96  # 200, and what the last tile has past their end

    def work(heads: int, seqlen_q: int, is_causal: bool) -> float:
        size = Size(heads, seqlen_q, 200)
        return tile_table.work_of_fullest_sm(tile, size, SMS, is_causal) / (128 * keys)

    assert work(132, 128, False) == 1.0
    assert work(133, 1, False) == 2.0
    assert work(132, 129, False) == 2.0
    # Long row tiles and short ones are dealt out evenly, but nobody has less than a long one.
    assert work(133, 128, True) == 1.0
    assert work(132 * 2, 256, True) == 2.0
    assert work(132 * 2 + 33, 256, True) == 2.25
    assert work(132 * 2, 129, True) == 1.5  # 64 rows at a time


def test_what_is_not_legal_is_not_chosen(ship: Any) -> None:
    large = plan_with(ASKED, 128, 4096)
    ship((ASKED, {RULES: 3e-3, OTHER: 2e-3, large: 1e-3}))
    assert select_plan(ASKED) == OTHER
    ship((ASKED, {large: 1e-3}))
    assert select_plan(ASKED) == RULES


def test_it_can_be_switched_off(ship: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}))
    assert select_plan(ASKED, gate="qk") == candidates(ASKED, gate="qk")[0]
    assert select_plan(ASKED, 80) == candidates(ASKED, 80)[0]
    monkeypatch.setenv("FLASHCORE_TUNED", "0")
    assert select_plan(ASKED) == OTHER
    monkeypatch.setenv("FLASHCORE_TUNED", "rules")
    assert select_plan(ASKED) == RULES


def test_what_was_found_on_this_machine_comes_first(
    ship: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}))
    own = plan_with(ASKED, 128, 96)
    key = ("NVIDIA H999", own.kernel, tuned.kernel_version(own.kernel), tuned.problem_class(ASKED))
    entry = tuned.Entry(*key, tile_of(own), 1e-3, 2e-3, "B1", "2026-02-03")
    monkeypatch.setattr(tuned, "gpu_name", lambda: "NVIDIA H999")
    monkeypatch.setattr(tuned, "read", lambda path: [entry])
    assert select_plan(ASKED) == own
    monkeypatch.setenv("FLASHCORE_TUNED", "0")
    assert select_plan(ASKED) == OTHER


def test_explain_says_where_tiles_come_from(ship: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "from_tensors", lambda *_, **__: ASKED)
    x = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)

    def note() -> str:
        notes = flashcore.explain(x, x, x, file=io.StringIO()).notes
        (found,) = [note for note in notes if note.startswith("tiles come from")]
        return found

    ship()
    assert "rules" in note()
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}))
    assert f"measured on NVIDIA H999, 2026-01-02, with {ASKED.describe()}" in note()
    assert "changed" not in note()
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}), kernels={"attn_fwd_sm90": "another"})
    assert "the kernel has changed since then" in note()


def test_a_table_is_written_and_read() -> None:
    table = table_of((ASKED, {RULES: 2e-3, OTHER: 1e-3}), (problem(512), {OTHER: 1e-4}))
    text = tile_table.to_json(table)
    assert tile_table.from_json(text) == table
    assert max(map(len, text.splitlines())) < 500
    with pytest.raises(ValueError, match="not of schema 1"):
        tile_table.from_json(text.replace('"schema": 1', '"schema": 99'))


def test_the_compile_gate_holds_the_table(ship: Any) -> None:
    ship((ASKED, {RULES: 2e-3, OTHER: 1e-3}))
    entries = configurations(archs=[90], head_dims=[96, 128])
    found = {entry.plan for entry in entries}
    seen = checked(entries)
    assert {e.plan.dtype for e in seen if e.ships} == {"bfloat16"}
    assert {e.variant for e in seen if e.ships} >= {"causal"}
    for dtype in ("float16", "bfloat16"):
        wanted = dataclasses.replace(OTHER, dtype=dtype)
        assert wanted in found
        few = candidates(problem(512, 1))[0]
        assert few not in (RULES, OTHER)
        assert dataclasses.replace(few, dtype=dtype) in found
        assert dataclasses.replace(wanted, head_dim=96, head_dim_v=96) not in found


@pytest.mark.parametrize("arch", [90])
def test_what_ships_can_be_used(arch: int) -> None:
    """A field that a Plan has got or lost since then makes all tiles strangers: measure anew."""
    table = tile_table.read(arch)
    if table is None:
        pytest.skip("nothing ships for this architecture")
    assert {"gpu", "date", "command", "versions", "kernels"} <= set(table.about)
    for cell in table.cells:
        dim, *options = cell.problem_class.split()
        assert set(options) <= {"window_right"}
        asked = problem(cell.size.seqlen_q, cell.size.heads, int(dim[1:]), causal=bool(options))
        rules = candidates(asked)[0]
        assert cell.rules in cell.seconds
        for number in cell.seconds:
            assert with_tile(rules, table.tiles[number]) is not None, cell
        choice = tile_table.choose(table, asked, rules)
        assert choice is not None
        assert choice.cell == cell
