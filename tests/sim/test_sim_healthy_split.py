"""Simulate keys that are split over blocks: no alarm, whatever the shape, the schedule and the
number of splits, right, and the same bit for bit whoever comes last; see test_sim_healthy.py."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from test_sim_healthy import draw_case
from test_sim_healthy_sm90 import make_plan

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.kernels.fwd_sm90 import params
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim import simulate

pytestmark = pytest.mark.thorough

SEEDS_OF_A_FAMILY = 16

# name -> (tile, what is fixed). Between them: one and two groups of rows, keys shared by two
# consumers besides, columns that are padding, splits without a key tile, rows without a key.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"dtype": "bfloat16"}),
    "causal": ({"block_m": 128}, {"causal": "lower_right", "layout": "bshd"}),
    "shared-keys": (
        {"key_slices": 2, "num_stages": 4},
        {"head_dim": 40, "head_dim_v": 96, "causal": "upper_left"},
    ),
    "window-softcap": ({}, {"window": (40, 20), "softcap": 5.0}),
    "additive-mask": ({}, {"head_dim": 96, "head_dim_v": 40, "mask": "additive", "spread": 4.0}),
    "decode": (
        {"num_stages": 4},
        {"seqlen_q": 1, "num_heads_q": 6, "num_heads_kv": 2, "seqlen_k": 301, "layout": "bshd"},
    ),
    "several-queries": (
        {"num_stages": 4},
        {"seqlen_q": 9, "num_heads_q": 8, "num_heads_kv": 1, "window": (100, 0), "tail": 0},
    ),
    "part-of-a-group": (
        {"num_stages": 4, "folds_heads": 2},
        {"seqlen_q": 3, "num_heads_q": 12, "num_heads_kv": 2, "window": (90, 0), "tail": 0},
    ),
}


def run(case: Case, tile: dict[str, Any], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that there is neither an alarm nor a wrong result."""
    x = make_inputs(case)
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options())
    out = torch.empty(*x.q.shape[:3], case.head_dim_v, dtype=case.torch_dtype)
    lse = torch.empty(x.q.shape[:3])
    plan = make_plan(problem, tile)
    simulate(problem, plan, x.q, x.k, x.v, x.mask, out, lse, seed=seed)
    errors = error_report(out, x.q, x.k, x.v, lse=lse, mask=x.mask, **case.options())
    assert errors.ok, f"{case.describe()}: {errors}\n{tile} {dataclasses.asdict(case)}"
    return out, lse


def add_up_together(monkeypatch: pytest.MonkeyPatch, most_polls: int) -> None:
    """Have shares added up by all blocks that still look after so many times; 0: by the last."""
    monkeypatch.setattr(params, "_most_polls", lambda *_: most_polls)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_is_healthy_and_right(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tile, fixed = FAMILIES[name]
    for seed in range(SEEDS_OF_A_FAMILY):
        drawn = random.Random(seed)
        num_splits = drawn.choice((2, 3, 5, 18))  # lanes have a share, none, or several
        add_up_together(monkeypatch, drawn.choice((0, 0, 1, 3, 32)))
        run(draw_case(fixed, seed), tile | {"num_splits": num_splits}, seed)


@pytest.mark.parametrize("most_polls", [0, 2, 32])
def test_the_result_does_not_depend_on_who_adds_up(
    monkeypatch: pytest.MonkeyPatch, most_polls: int
) -> None:
    """Be it the last one, alone or with those that are left, or all."""
    add_up_together(monkeypatch, most_polls)
    case = Case(seqlen_q=60, seqlen_k=400, head_dim=32, head_dim_v=32)
    results = [run(case, {"num_splits": 5}, seed) for seed in range(10)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_nan_behind_the_keys_stays_there_and_nan_in_them_shows() -> None:
    case = Case(seqlen_q=2, seqlen_k=200, num_heads_q=1, num_heads_kv=1, tail=3)
    tile = {"num_splits": 3}
    run(case, tile, 0)
    x = make_inputs(case)
    x.k[0, 0, 150] = torch.nan
    problem = Problem.from_tensors(x.q, x.k, x.v)
    out = torch.empty(1, 1, 2, 64, dtype=torch.float16)
    simulate(problem, make_plan(problem, tile), x.q, x.k, x.v, None, out, None)
    assert out.isnan().all()
