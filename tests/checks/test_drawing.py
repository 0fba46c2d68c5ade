"""Test what verify draws: every tile and schedule that ships, long sequences, scores that grow."""

from __future__ import annotations

import dataclasses

import pytest

from flashcore.backends.dispatch import KERNELS
from flashcore.backends.packed import packed_problem
from flashcore.checks import drawing
from flashcore.checks.cases import DRAWN_GROWTHS, GROWTH_KINDS, make_inputs
from flashcore.checks.drawing import Drawn
from flashcore.checks.planned import fits, format_tile, parse_tile, with_fields
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection import tile_table
from flashcore.selection.select import select_plan


def problem_of(case: Case | VarlenCase) -> Problem:
    if isinstance(case, VarlenCase):
        return packed_problem(*make_varlen_inputs(case).arguments(), **case.options())
    x = make_inputs(case)
    return Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options())


def drawn_for_sim(arch: int, seed: int = 0) -> list[Drawn]:
    return [
        drawing.draw(seed, index, "sim", arch)
        for index in range(2 * drawing.num_configurations(arch))
    ]


def plans_of(arch: int, seed: int) -> list[Plan]:
    kernel = KERNELS["sm90" if arch == 90 else "wmma"]
    drawn = [each for each in drawn_for_sim(arch, seed) if not problem_of(each.case).is_empty]
    return [
        with_fields(select_plan(problem_of(each.case), arch, None, kernel), each.tile)
        for each in drawn
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_hopper_kernels_cases_have_every_schedule(seed: int) -> None:
    plans = plans_of(90, seed)
    assert {plan.kernel for plan in plans} == {KERNELS["sm90"]}

    def seen(name: str) -> set[object]:
        return {getattr(plan, name) for plan in plans}

    assert seen("ping_pong") == {False, True}
    assert seen("key_slices") == {1, 2, 3}
    assert seen("q_buffers") == {1, 2}
    assert seen("o_parts") == {1, 2, 4}
    assert seen("num_consumers") == {1, 2, 3}
    assert seen("num_stages") >= {2, 3, 4, 6, 9}
    assert seen("num_splits") >= {1, 3, 4}
    assert seen("varlen") == {"none", "packed"}
    assert len(seen("folds_heads")) > 1
    turns = {(plan.num_warps, plan.has_window_right) for plan in plans if "ping_pong" in str(plan)}
    assert {(12, False), (12, True), (16, False), (16, True)} <= turns


def test_the_portable_kernels_cases_have_every_tile() -> None:
    plans = plans_of(80, 0)
    assert {plan.block_m for plan in plans} == {64, 128}
    assert {plan.block_n for plan in plans} == {16, 32, 64, 128}
    assert {plan.num_stages for plan in plans} == {1, 2, 3}


@pytest.mark.parametrize("arch", [80, 90])
def test_cases_are_long_and_their_scores_grow(arch: int) -> None:
    cases = [each.case for each in drawn_for_sim(arch) if isinstance(each.case, Case)]
    assert sum(case.seqlen_k > 250 for case in cases) > len(cases) // 3
    growths = {case.growth for case in cases}
    assert growths == set(DRAWN_GROWTHS) if arch == 90 else len(growths) > 4


def test_cases_for_the_gpu_draw_every_tile_that_ships() -> None:
    table = tile_table.read(90)
    assert table is not None
    drawn = {format_tile(drawing.draw(0, index, "sm90").tile) for index in range(3000)}
    assert {format_tile(tile) for tile in table.tiles} <= drawn
    portable = {format_tile(drawing.draw(0, index, "wmma").tile) for index in range(300)}
    assert {format_tile(tile) for tile in drawing.shipped_tiles(KERNELS["wmma"])} <= portable


def test_a_tile_that_a_cases_options_would_make_spill_is_not_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drawn tiles of 192x128 met softcaps, sinks and a window."""
    wide = parse_tile("192x128,num_stages=2,min_blocks=1,ping_pong")
    monkeypatch.setattr(drawing, "shipped_tiles", lambda kernel: (wide,))
    drawn = [drawing.draw(0, index, "sm90") for index in range(600)]
    assert sum(bool(each.tile) for each in drawn) > 20
    asked = [(each.case.softcap, each.case.window, each.case.sinks) for each in drawn]
    crowded = [
        each.tile
        for each, options in zip(drawn, asked, strict=True)
        if all(options) and each.case.mask == "none"
    ]
    assert len(crowded) > 3
    assert not any(crowded)


@pytest.mark.parametrize("growth", GROWTH_KINDS)
def test_scores_grow_as_the_case_says(growth: str) -> None:
    case = Case(seqlen_q=20, seqlen_k=200, head_dim=16, dtype="float64", growth=growth)
    x = make_inputs(case)
    plain = make_inputs(dataclasses.replace(case, growth="none"))
    added = (x.q @ x.k.mT - plain.q[..., 1:] @ plain.k[..., 1:].mT) * case.head_dim**-0.5
    late, early = added[..., 10:11, :32].mean(), added[..., 10:11, -32:].mean()
    if growth in ("slow", "fast", "far", "zigzag"):
        assert late > early + 20  # keys are visited from the last to the first
    elif growth == "falling":
        assert late < early - 20
    elif growth == "level":
        assert added.sub(8e6).abs().max() < 1e-3
    elif growth != "none":
        rows = added[0, 0].amax(-1) > 25
        assert rows.tolist() == [row % 7 == 3 for row in range(20)]


def test_an_unknown_growth_says_what_there_is() -> None:
    with pytest.raises(ValueError, match="growth='sideways' is not one of none, slow"):
        make_inputs(Case(growth="sideways"))


def test_a_tile_is_read_as_it_is_written() -> None:
    tile = parse_tile("128x64,ping_pong,stages=3,lazy_rescale=false")
    assert tile == {
        "block_m": 128,
        "block_n": 64,
        "ping_pong": True,
        "num_stages": 3,
        "lazy_rescale": False,
    }
    assert parse_tile(format_tile(tile)) == tile
    assert parse_tile("num_splits=4") == {"num_splits": 4}
    for tile in drawing.shipped_tiles(KERNELS["sm90"]):
        assert parse_tile(format_tile(tile)) == tile


@pytest.mark.parametrize("text", ["", "128x", "x64,ping_pong=often", "=3", "num_stages=-1"])
def test_what_is_no_tile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"tile=|is neither"):
        with_fields(select_plan(problem_of(Case()), 90), parse_tile(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("128x64,colour=3", "colour=3 is no field of a tile of attn_fwd_sm90"),
        ("num_stages", "num_stages=True is no field"),
        ("256x256", "too much shared memory"),
        ("64x64,ping_pong", "exclude each other"),
    ],
)
def test_a_tile_that_a_kernel_cannot_have_is_refused(text: str, words: str) -> None:
    plan = select_plan(problem_of(Case()), 90)
    with pytest.raises(ValueError, match=words):
        with_fields(plan, parse_tile(text))
    assert not fits(plan, parse_tile(text))


def test_a_tile_with_its_size_is_a_new_one_and_without_changes_the_chosen() -> None:
    plan = select_plan(problem_of(Case(seqlen_q=100, seqlen_k=300, head_dim=96)), 90)
    assert plan.key_slices > 1  # type: ignore[attr-defined]
    new = with_fields(plan, {"block_m": 128, "block_n": 64})
    assert (new.num_stages, new.key_slices) == (2, 1)  # type: ignore[attr-defined]
    changed = with_fields(plan, {"lazy_rescale": False})
    assert changed == dataclasses.replace(plan, lazy_rescale=False)  # type: ignore[call-arg]
