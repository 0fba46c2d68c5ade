"""Simulate work that the device cuts into equal ranges (stream-K): no alarm, whatever the lengths
and the schedule, right, and the same bit for bit; see test_sim_healthy.py."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sim_healthy_sm90 import make_plan

from flashcore.checks.accuracy import error_report
from flashcore.checks.paged_cases import draw_paged_case, make_paged_inputs, paged_error_report
from flashcore.kernels.fwd_sm90.candidates import two_can_load
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.ops.padded import padded_problem
from flashcore.ops.paged import NAMES, paged_problem
from flashcore.problem import Problem
from flashcore.problem.options import Inputs, Options
from flashcore.sim import simulate

SEEDS_OF_A_FAMILY = 12
STREAM_K = {"stream_k": True}

# name -> (tile, what is fixed, options of the call). Between them: one and two groups of rows, keys
# shared by two consumers besides, one to three row tiles a sequence, columns that are padding.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one-query": ({}, {"heads": (4, 4)}, {}),
    "group": ({"num_stages": 4, "q_buffers": 2}, {"heads": (6, 2), "dims": (40, 96)}, {}),
    "several-queries": ({}, {"heads": (4, 2), "queries": 9}, {"causal": "lower_right"}),
    "window": ({}, {"heads": (2, 1), "queries": 3}, {"causal": "lower_right", "window": (70, 0)}),
    "shared-keys": ({"key_slices": 2, "num_stages": 4}, {"heads": (8, 1), "queries": 2}, {}),
    "many-rows": (
        {"block_m": 128, "ping_pong": True},
        {"heads": (2, 2), "queries": 140},
        {"causal": "upper_left", "softcap": 5.0},
    ),
    "group-of-71": ({}, {"heads": (71, 1)}, {}),
    "sinks": ({}, {"heads": (4, 2), "queries": 2, "sinks": True}, {"causal": "lower_right"}),
}


def draw_lengths(seed: int, most: int) -> list[int]:
    """Draw lengths of sequences: mixed, around key tiles; all alike; short, but one."""
    rng = random.Random(seed)
    batch = rng.choice((1, 2, 5, most))
    kind = rng.choice(("mixed", "alike", "one", "short"))
    if kind == "alike":
        return [rng.choice((32, 33, 95))] * batch
    choices = {"mixed": (0, 1, 31, 32, 33, 64, 100, 150), "one": (0, 1, 5), "short": (0, 1, 2)}
    lengths = [rng.choice(choices[kind]) for _ in range(batch)]
    if kind == "one":
        lengths[rng.randrange(batch)] = 500
    return lengths if any(lengths) else [1, *lengths]


def simulate_lengths(
    lengths: list[int], tile: dict[str, Any], fixed: dict[str, Any], options: dict[str, Any],
    seed: int, *, max_score: bool = False,
    make: Callable[[Problem, dict[str, Any]], Plan] = make_plan, schedule: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run the kernel on a cache of these lengths, with NaN behind them, and check its result."""
    generator = torch.Generator().manual_seed(seed)
    (heads, heads_kv), (dim, dim_v) = fixed["heads"], fixed.get("dims", (32, 32))
    batch, room = len(lengths), max(lengths) + random.Random(seed).choice((0, 0, 45))
    q = torch.randn(batch, heads, fixed.get("queries", 1), dim, generator=generator).half() * 2
    k = torch.randn(batch, heads_kv, room, dim, generator=generator).half()
    v = torch.randn(batch, heads_kv, room, dim_v, generator=generator).half()
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = torch.nan
    sinks = torch.randn(heads, generator=generator) if fixed.get("sinks") else None
    seqlens_k = torch.tensor(lengths, dtype=torch.int32)
    inputs = Inputs(q, k, v, seqlens_k=seqlens_k, sinks=sinks)
    asked = {"causal": False, "window": None, "softcap": None, "scale": None} | options
    problem = padded_problem(inputs, Options.checked(**asked))
    problem = dataclasses.replace(problem, return_max_score=max_score)
    plan = make(problem, tile | STREAM_K)
    out, lse = torch.empty(*q.shape[:3], dim_v).half(), torch.empty(q.shape[:3])
    largest = torch.full((batch, heads), -torch.inf) if max_score else None
    others = {"seqlens_k": seqlens_k} | ({} if sinks is None else {"sinks": sinks})
    run = seed if schedule is None else schedule
    simulate(problem, plan, q, k, v, None, out, lse, None, others, seed=run, max_score=largest)
    for b, n in enumerate(lengths):
        own = slice(b, b + 1)
        sequence = q[own], k[own, :, :n], v[own, :, :n]
        report = error_report(out[own], *sequence, lse=lse[own], sinks=sinks, **asked)
        assert report.ok, f"sequence {b} of {lengths}: {report}"
        if largest is not None and n:
            group = heads // heads_kv
            scores = q[own].double() @ k[own, :, :n].repeat_interleave(group, 1).mT.double()
            want = scores.amax((2, 3))[0] / dim**0.5
            torch.testing.assert_close(largest[b].double(), want, rtol=1e-5, atol=1e-5)
    return out, lse


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_is_healthy_and_right(name: str) -> None:
    tile, fixed, options = FAMILIES[name]
    for seed in range(SEEDS_OF_A_FAMILY):
        most = 40 if fixed.get("queries", 1) < 20 else 5
        simulate_lengths(draw_lengths(seed, most), tile, fixed, options, seed)


@pytest.mark.parametrize("lengths", [[0, 33, 1, 260], [64, 64, 64], [7, 0, 0, 0, 0]])
def test_work_is_cut_by_the_lengths_that_there_are(lengths: list[int]) -> None:
    fixed = {"heads": (4, 2), "queries": 2}
    out, lse = simulate_lengths(lengths, {}, fixed, {"causal": "lower_right"}, 1)
    again = simulate_lengths(lengths, {}, fixed, {"causal": "lower_right"}, 1)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


def test_the_largest_scores_are_those_of_all_ranges() -> None:
    simulate_lengths([0, 40, 200], {}, {"heads": (4, 2)}, {}, 0, max_score=True)


def simulate_pages(
    seed: int, page_size: int, make: Callable[[Problem, dict[str, Any]], Plan] = make_plan
) -> None:
    """Run the kernel on a cache in pages, of lengths that are drawn, and check its result."""
    fixed = {"page_size": page_size, "seqlen_q": random.Random(seed).choice((1, 4))}
    case = draw_paged_case(seed, **fixed, causal="lower_right")
    if max(case.lengths) == 0:
        return
    x = make_paged_inputs(case)
    q, k, v, table, seqlens_k = x.arguments()
    inputs = Inputs(q, k, v, seqlens_k=seqlens_k, page_table=table)
    problem = paged_problem(inputs, Options.checked(**case.options()))
    out, lse = torch.empty(*q.shape[:3], case.head_dim_v).half(), torch.empty(q.shape[:3])
    lengths = {name: getattr(inputs, name) for name in NAMES}
    simulate(problem, make(problem, STREAM_K), q, k, v, None, out, lse, None, lengths, seed=seed)
    report = paged_error_report(out, lse, case, x)
    assert report.ok, f"{case.describe()}: {report}"


def make_two_loaders(problem: Problem, tile: dict[str, Any]) -> Plan:
    """Return a plan in which a warp loads keys and another one values, where boxes are several."""
    plan = make_plan(problem, tile)
    return dataclasses.replace(plan, loaders=2 if two_can_load(plan) else 1)


def test_two_warps_find_the_same_pieces() -> None:
    for seed in range(2):
        simulate_pages(seed, 16, make_two_loaders)


@pytest.mark.thorough
@pytest.mark.parametrize("page_size", [8, 16])
def test_two_warps_that_load_are_healthy_and_right(page_size: int) -> None:
    for seed in range(SEEDS_OF_A_FAMILY):
        simulate_pages(seed, page_size, make_two_loaders)


@pytest.mark.thorough
@pytest.mark.parametrize("page_size", [8, 16, 48, 128])
def test_pages_are_healthy_and_right(page_size: int) -> None:
    for seed in range(SEEDS_OF_A_FAMILY):
        simulate_pages(seed, page_size)
