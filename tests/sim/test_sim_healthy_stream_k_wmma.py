"""Simulate the portable kernel's work that the device cuts into equal ranges (stream-K) or pieces
of one length: no alarm, whatever the lengths and the schedule, right, and the same bit for bit; see
test_sim_healthy_stream_k.py."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from parameters import thorough_but
from test_sim_healthy_stream_k import (
    SEEDS_OF_A_FAMILY,
    draw_lengths,
    simulate_lengths,
    simulate_pages,
)

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.kernels.fwd_wmma.plan import KERNEL, Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import candidates
from flashcore.selection.space import is_legal
from flashcore.sim import simulate

# Two or three key tiles, so that short sequences have several pieces.
PIECES = {"keys_of_chunk": 48}

# name -> (tile, what is fixed, options of the call). Between them: one to three row tiles a
# sequence, columns that are padding, one stage to three, no asynchronous copies, and pieces of one
# length.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one-query": ({}, {"heads": (4, 4)}, {}),
    "group": ({"num_stages": 3}, {"heads": (6, 2), "dims": (40, 96)}, {}),
    "several-queries": ({}, {"heads": (4, 2), "queries": 9}, {"causal": "lower_right"}),
    "window": ({}, {"heads": (2, 1), "queries": 3}, {"causal": "lower_right", "window": (70, 0)}),
    "many-rows": (
        {},
        {"heads": (2, 2), "queries": 140},
        {"causal": "upper_left", "softcap": 5.0},
    ),
    "group-of-71": ({"num_stages": 1}, {"heads": (71, 1)}, {}),
    "sinks": ({}, {"heads": (4, 2), "queries": 2, "sinks": True}, {"causal": "lower_right"}),
    "sm_75": ({"arch": 75, "num_stages": 1}, {"heads": (4, 2), "queries": 3}, {}),
    "pieces": (PIECES, {"heads": (4, 2), "queries": 3}, {"causal": "lower_right"}),
    "pieces-group": (PIECES, {"heads": (71, 1), "dims": (24, 40)}, {}),
}


def make_plan(problem: Problem, tile: dict[str, Any]) -> Plan:
    """Return a plan with short key tiles: more steps of the loop over keys for a length."""
    plan = candidates(problem, 80, kernel=KERNEL)[0]
    plan = dataclasses.replace(
        plan, **{"block_m": 64, "block_n": 16, "num_stages": 2, "min_blocks": 1} | tile
    )
    assert is_legal(plan)
    return plan


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_is_healthy_and_right(name: str) -> None:
    tile, fixed, options = FAMILIES[name]
    for seed in range(SEEDS_OF_A_FAMILY):
        most = 40 if fixed.get("queries", 1) < 20 else 5
        lengths = draw_lengths(seed, most)
        simulate_lengths(lengths, tile, fixed, options, seed, make=make_plan)


LENGTHS = [0, 33, 1, 260], [64, 64, 64], [7, 0, 0, 0, 0]


@pytest.mark.parametrize("tile", [{}, PIECES], ids=["ranges", "pieces"])
@pytest.mark.parametrize("lengths", thorough_but(LENGTHS[:1], LENGTHS))
def test_work_is_cut_by_the_lengths_that_there_are(
    lengths: list[int], tile: dict[str, Any]
) -> None:
    call = lengths, tile, {"heads": (4, 2), "queries": 2}, {"causal": "lower_right"}
    out, lse = simulate_lengths(*call, 1, make=make_plan)
    again = simulate_lengths(*call, 1, make=make_plan)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.thorough
def test_shares_are_added_in_the_order_of_keys_whoever_adds_them() -> None:
    call = [500], {}, {"heads": (2, 1), "queries": 5}, {}
    out, lse = simulate_lengths(*call, 0, make=make_plan)
    for schedule in range(1, 6):
        again = simulate_lengths(*call, 0, make=make_plan, schedule=schedule)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])


@pytest.mark.thorough
def test_the_largest_scores_are_those_of_all_ranges() -> None:
    simulate_lengths([0, 40, 200], {}, {"heads": (4, 2)}, {}, 0, max_score=True, make=make_plan)


def run_dense(fixed: dict[str, Any], tile: dict[str, Any], seed: int) -> None:
    """Check a call whose lengths the host knows, in which nothing but STREAM_K cuts keys."""
    sizes = {"batch": 2, "num_heads_q": 4, "num_heads_kv": 2, "seqlen_q": 3, "seqlen_k": 300}
    case = Case(**{**sizes, "head_dim": 32, "head_dim_v": 32} | fixed, seed=seed)
    x = make_inputs(case)
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options())
    plan = make_plan(problem, tile | {"stream_k": True})
    out = torch.empty(*x.q.shape[:3], case.head_dim_v, dtype=case.torch_dtype)
    lse = torch.empty(x.q.shape[:3])
    simulate(problem, plan, x.q, x.k, x.v, x.mask, out, lse, seed=seed)
    errors = error_report(out, x.q, x.k, x.v, lse=lse, mask=x.mask, **case.options())
    assert errors.ok, f"{case.describe()}: {errors}"


DENSE = {
    "full": {"dtype": "bfloat16"},
    "bool-mask": {"mask": "bool", "causal": "lower_right"},
    "additive-mask": {"mask": "additive", "window": (200, 9), "softcap": 5.0, "seqlen_q": 70},
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", DENSE)
def test_dense_calls_are_cut_too(name: str) -> None:
    run_dense(DENSE[name], {}, 1)


@pytest.mark.thorough
@pytest.mark.parametrize("name", DENSE)
def test_dense_calls_with_any_schedule(name: str) -> None:
    for seed in range(SEEDS_OF_A_FAMILY):
        run_dense(DENSE[name] | {"seqlen_k": random.Random(seed).choice((17, 64, 333))}, {}, seed)
        run_dense(DENSE[name], PIECES, seed)


def test_a_cache_in_pages_is_cut_too() -> None:
    simulate_pages(2, 16, make_plan)


@pytest.mark.thorough
@pytest.mark.parametrize("page_size", [1, 16, 40])
def test_pages_are_healthy_and_right(page_size: int) -> None:
    for seed in range(SEEDS_OF_A_FAMILY):
        simulate_pages(seed, page_size, make_plan)
