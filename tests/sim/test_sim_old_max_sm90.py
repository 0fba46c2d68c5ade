"""The Hopper kernel's softmax takes terms relative to an old maximum, and looks for a new one where
they come out too large (tile/softmax.cuh, has_outgrown)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from plant_checks import check_text, seeds_of, undocumented
from test_sim_healthy_sm90 import make_plan
from torch import Tensor

import flashcore
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.fwd_sm90.old_max import PLANTS_OLD_MAX_SM90

pytestmark = pytest.mark.thorough

BESIDE_MASK = [name for name, plant in PLANTS_OLD_MAX_SM90.items() if "mask" in plant.plan]
# Keys are visited from last to first: four key tiles and more, of which the first and, with bounds,
# some others are masked.
CASE = Case(
    num_heads_q=2,
    num_heads_kv=1,
    seqlen_q=150,
    seqlen_k=181,  # causal, rows 0 and 64 see whole key tiles, none of which is masked
    head_dim=64,
    head_dim_v=64,
    dtype="bfloat16",
)
# Nats that are added to a key's score, by keys as they are visited, and the rows that see it.
GROWTHS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda key: 0.0 * key, torch.ones_like),
    "every tile by 2^6": (lambda key: key // 32 * 4.2, torch.ones_like),
    "every tile by 2^30": (lambda key: key // 32 * 21.0, torch.ones_like),
    "every tile past float32": (lambda key: key // 32 * 200.0, torch.ones_like),
    "one key of some rows": (lambda key: (key == 70) * 30.0, lambda row: row % 7 == 3),
    "one key of one row past float32": (lambda key: (key == 40) * 120.0, lambda row: row == 101),
    "falling": (lambda key: key // 32 * -40.0, torch.ones_like),
}


def with_growth(case: Case, growth: str, key_tile: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with scores that grow so: a column of q and of k holds it."""
    x = make_inputs(case)
    q, k = x.q.clone(), x.k.clone()
    of_keys, of_rows = GROWTHS[growth]
    keys = torch.arange(case.seqlen_k).flip(0) * 32 // key_tile
    k[..., 0] = of_keys(keys) * case.head_dim**0.5
    q[..., 0] = of_rows(torch.arange(case.seqlen_q))
    return q, k, x.v


@functools.cache
def inputs(
    growth: str, options: tuple[tuple[str, object], ...] = ()
) -> tuple[Problem, Tensor, Tensor, Tensor]:
    q, k, v = with_growth(CASE, growth)
    problem = Problem.from_tensors(q, k, v, return_lse=True, **dict(options))  # type: ignore[arg-type]
    return problem, q, k, v


def run(
    growth: str,
    seed: int,
    plant: Plant | None = None,
    tile: tuple[tuple[str, object], ...] = (),
    options: tuple[tuple[str, object], ...] = (),
) -> SimulationError | str:
    """Run a case; return the alarm, or "wrong-result", or "healthy"."""
    problem, q, k, v = inputs(growth, options)
    plan = make_plan(problem, {"block_m": 128, "ping_pong": True, **dict(tile)})
    out = torch.empty(1, 2, CASE.seqlen_q, CASE.head_dim_v, dtype=torch.bfloat16)
    lse = torch.empty(1, 2, CASE.seqlen_q)
    try:
        simulate(problem, plan, q, k, v, None, out, lse, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    errors = error_report(out, q, k, v, lse=lse, **dict(options))  # type: ignore[arg-type]
    return "healthy" if errors.ok else "wrong-result"


TILES = [
    (),
    (("block_m", 192), ("ping_pong", False), ("num_stages", 3)),
    (("block_m", 64), ("ping_pong", False), ("key_slices", 3), ("num_stages", 6)),
]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    "options", [(), (("causal", "lower_right"),), (("window", (60, 3)),)], ids=str
)
@pytest.mark.parametrize("growth", GROWTHS)
def test_however_scores_grow(
    growth: str, options: tuple[tuple[str, object], ...], tile: tuple[tuple[str, object], ...]
) -> None:
    for seed in range(2):
        assert run(growth, seed, None, tile, options) == "healthy"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": "lower_right"}, {"window": (700, 3)}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("growth", GROWTHS)
def test_however_scores_grow_on_a_gpu(
    growth: str, head_dim: int, options: dict[str, object]
) -> None:
    case = dataclasses.replace(
        CASE, batch=2, seqlen_q=1030, seqlen_k=2077, head_dim=head_dim, head_dim_v=head_dim
    )
    q, k, v = (x.cuda() for x in with_growth(case, growth, key_tile=128))
    out, lse = flashcore.attention(q, k, v, return_lse=True, **options)  # type: ignore[call-overload]
    report = error_report(out, q, k, v, lse=lse, **options)  # type: ignore[arg-type]
    assert report.ok, report
    assert report.max_error < 0.03, report  # torch's own can be 3: bfloat16 scores past float32


def test_nan_and_infinity_are_seen() -> None:
    """The oracle sees them too, whatever the old maximum is."""
    _, q, k, v = inputs("none")
    k = k.clone()
    k[0, 0, 50, 3] = torch.nan
    k[0, 0, 20, 5] = torch.inf
    problem = Problem.from_tensors(q, k, v)
    out = torch.empty(1, 2, CASE.seqlen_q, CASE.head_dim_v, dtype=torch.bfloat16)
    simulate(problem, make_plan(problem, {"block_m": 64}), q, k, v, None, out, None, seed=1)
    assert out.isnan().all()


def check_plant(plant: Plant, growth: str, options: tuple[tuple[str, object], ...]) -> None:
    tile = tuple(plant.plan.items())
    assert run(growth, 0, None, tile, options) == "healthy"
    for seed in seeds_of(plant):
        found = run(growth, seed, plant, tile, options)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("name", [x for x in PLANTS_OLD_MAX_SM90 if x not in BESIDE_MASK])
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    causal = (("causal", "lower_right"),)
    growth, options = {
        "no-max-yet-unseen": ("none", causal),
        "outgrown-in-one-warp": ("one key of one row past float32", ()),
        "unseen-part-of-the-warp-before": ("none", causal),
        "unseen-part-kept": ("none", causal),
        "second-part-not-hidden": ("none", causal),
    }.get(name, ("every tile past float32", ()))
    check_plant(PLANTS_OLD_MAX_SM90[name], growth, options)


@pytest.mark.parametrize("name", PLANTS_OLD_MAX_SM90)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS_OLD_MAX_SM90[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(PLANTS_OLD_MAX_SM90) == []


@functools.cache
def masked(dtype: torch.dtype) -> tuple[Problem, Tensor, Tensor, Tensor, Tensor]:
    """Return scores that grow, and a mask of every query and key, some of which see nothing."""
    q, k, v = with_growth(CASE, "every tile by 2^6")
    generator = torch.Generator().manual_seed(0)
    mask = torch.randn(1, 2, CASE.seqlen_q, CASE.seqlen_k, generator=generator)
    mask[:, :, 30:33] = -torch.inf
    mask = mask > -0.5 if dtype == torch.bool else mask.to(dtype)
    return Problem.from_tensors(q, k, v, mask=mask, return_lse=True), q, k, v, mask


@functools.cache
def under_a_triangle() -> tuple[Problem, Tensor, Tensor, Tensor, Tensor]:
    """Return scores under a boolean mask of what causal rows see: it hides key tiles from rows that
    have seen nothing yet. Its edge crosses a key tile of each warpgroup in front of the last keys
    of all lanes."""
    _, q, k, v = inputs("none")
    mask = torch.ones(1, 1, CASE.seqlen_q, CASE.seqlen_k, dtype=torch.bool).tril(17)
    mask[..., 40::64, -1] = True  # other rows have no maximum in the key tiles that follow
    return Problem.from_tensors(q, k, v, mask=mask, return_lse=True), q, k, v, mask


HIDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "everything": lambda row, key: key < 0,
    "all but the last key": lambda row, key: key == key.numel() - 1,
    "all but the first key": lambda row, key: key == 0,
    "all but two keys": lambda row, key: (key == 40) | (key == 170),
    "above a triangle": lambda row, key: key <= row + 31,
    "below a triangle": lambda row, key: key >= row,
    "beside a band": lambda row, key: (key <= row + 5) & (key > row - 30),
    "beside documents": lambda row, key: row // 50 == key // 50,
    "other tiles of every row": lambda row, key: (row + key // 32) % 3 == 0,
    "all for most rows": lambda row, key: (row % 37 == 5) & (key // 32 % 2 == 0),
}


def hiding(which: str, case: Case, scale: int = 1) -> Tensor:
    """Return a boolean mask that hides whole key tiles, [1, 1, seqlen_q, seqlen_k].

    Args:
        which: a key of HIDING.
        case: the sizes.
        scale: how many times as long as a key tile of 32 its pattern is.
    """
    row, key = torch.arange(case.seqlen_q)[:, None], torch.arange(case.seqlen_k)
    visible = HIDING[which](row // scale, key // scale)
    return visible.expand(case.seqlen_q, case.seqlen_k)[None, None].contiguous()


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("which", HIDING)
def test_hidden_key_tiles_are_passed_over(which: str, tile: tuple[tuple[str, object], ...]) -> None:
    _, q, k, v = inputs("every tile by 2^6")
    mask = hiding(which, CASE)
    problem = Problem.from_tensors(q, k, v, mask=mask, return_lse=True)
    plan = make_plan(problem, {"block_m": 128, "ping_pong": True, **dict(tile)})
    out = torch.empty(1, 2, CASE.seqlen_q, CASE.head_dim_v, dtype=torch.bfloat16)
    lse = torch.empty(1, 2, CASE.seqlen_q)
    simulate(problem, plan, q, k, v, mask, out, lse, seed=0)
    assert error_report(out, q, k, v, lse=lse, mask=mask).ok


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": "lower_right"}, {"window": (700, 3)}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("which", HIDING)
def test_hidden_key_tiles_are_passed_over_on_a_gpu(
    which: str, head_dim: int, options: dict[str, object]
) -> None:
    case = dataclasses.replace(
        CASE, batch=2, seqlen_q=1030, seqlen_k=2077, head_dim=head_dim, head_dim_v=head_dim
    )
    x = make_inputs(case)
    mask = hiding(which, case, scale=7)
    q, k, v = (t.cuda() for t in (x.q, x.k, x.v))
    out, lse = flashcore.attention(q, k, v, mask=mask.cuda(), return_lse=True, **options)  # type: ignore[call-overload]
    report = error_report(out, q, k, v, lse=lse, mask=mask.cuda(), **options)  # type: ignore[arg-type]
    assert report.ok, report


def run_masked(
    dtype: torch.dtype, seed: int, plant: Plant | None = None, triangle: bool = False
) -> SimulationError | str:
    """Run such a case, as `run` does."""
    problem, q, k, v, mask = under_a_triangle() if triangle else masked(dtype)
    plan = make_plan(problem, {"block_m": 128, "ping_pong": True})
    assert plan.old_max_serves == (dtype != torch.bfloat16)  # others are masked once
    out = torch.empty(1, 2, CASE.seqlen_q, CASE.head_dim_v, dtype=torch.bfloat16)
    lse = torch.empty(1, 2, CASE.seqlen_q)
    try:
        simulate(problem, plan, q, k, v, mask, out, lse, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    ok = error_report(out, q, k, v, lse=lse, mask=mask).ok
    return "healthy" if ok else "wrong-result"


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_scores_that_are_asked_for_again_are_masked_again(dtype: torch.dtype) -> None:
    assert run_masked(dtype, 0) == "healthy"


def test_scores_of_a_hidden_key_tile_are_not_asked_for_again() -> None:
    """They do not count, NaN or not."""
    for seed in range(5):
        assert run_masked(torch.bool, seed, triangle=True) == "healthy"
    problem, q, k, v, mask = under_a_triangle()
    k = k.clone()
    k[:, :, 80:] = torch.nan  # rows up to 62 do not see it
    out = torch.empty(1, 2, CASE.seqlen_q, CASE.head_dim_v, dtype=torch.bfloat16)
    plan = make_plan(problem, {"block_m": 64})
    simulate(problem, plan, q, k, v, mask, out, None, seed=1)
    assert error_report(out[:, :, :40], q[:, :, :40], k, v, mask=mask[:, :, :40]).ok
    assert out[:, :, 63:].isnan().all()


@pytest.mark.parametrize("name", BESIDE_MASK)
def test_a_planted_bug_beside_a_mask_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS_OLD_MAX_SM90[name]
    triangle = name.startswith("hidden-tile")
    assert not triangle or run_masked(torch.bool, 0, triangle=True) == "healthy"
    for seed in seeds_of(plant):
        found = run_masked(torch.float32, seed, plant, triangle)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


def test_soft_capped_calls_do_not_try_it() -> None:
    """Soft-capping would have to be applied once more."""
    problem, q, k, v = inputs("every tile by 2^30", (("softcap", 20.0),))
    plan = make_plan(problem, {"block_m": 64})
    out = torch.empty(1, 2, CASE.seqlen_q, CASE.head_dim_v, dtype=torch.bfloat16)
    lse = torch.empty(1, 2, CASE.seqlen_q)
    simulate(problem, plan, q, k, v, None, out, lse, seed=0)
    assert error_report(out, q, k, v, lse=lse, softcap=20.0).ok
