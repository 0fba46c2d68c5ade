"""Both kernels on caches in pages raise no alarm, whatever the lengths, pages and schedule, and are
right; see test_sim_healthy.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sim_healthy_sm90 import make_plan

from flashcore.checks.paged_cases import draw_paged_case, make_paged_inputs, paged_error_report
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.ops.paged import paged_problem
from flashcore.problem import Problem
from flashcore.problem.options import Options
from flashcore.selection.select import candidates
from flashcore.sim import simulate

pytestmark = pytest.mark.thorough

SEEDS_OF_A_FAMILY = 16

# name -> (tile of the Hopper kernel or None for the portable one, what is fixed).
FAMILIES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "portable": (None, {"causal": "lower_right", "dtype": "bfloat16"}),
    "portable-single-keys": (None, {"page_size": 1, "head_dim": 40, "head_dim_v": 40}),
    "hopper-one-consumer": ({"block_m": 64, "o_parts": 2}, {}),
    "hopper-two-consumers": (
        {"block_m": 128, "ping_pong": True},
        {"window": (20, 9), "dtype": "bfloat16", "seqlen_q": 150},
    ),
    "hopper-three-consumers": (
        {"block_m": 192, "ping_pong": True},
        {"causal": "lower_right", "seqlen_q": 200, "heads_first": True},
    ),
    "hopper-shared-keys": (
        {"block_m": 64, "key_slices": 2, "num_stages": 4},
        {"dtype": "bfloat16"},
    ),
    "hopper-split-keys": (
        {"block_m": 64, "num_splits": 3},
        {"seqlen_q": 1, "head_dim": 32, "head_dim_v": 72},
    ),
    "hopper-8-bits": (
        {"block_m": 64, "load_stages": 2},
        {"dtype": "bfloat16", "cache_dtype": "float8_e4m3fn"},
    ),
    "hopper-8-bits-two-consumers": (
        {"block_m": 128, "load_stages": 3},
        {
            "seqlen_q": 150,
            "causal": "lower_right",
            "cache_dtype": "float8_e4m3fn",
            "dtype": "bfloat16",
            "head_dim": 160,
        },
    ),
    "hopper-8-bits-split-keys": (
        {"block_m": 64, "load_stages": 2, "num_splits": 3},
        {"seqlen_q": 1, "head_dim": 32, "head_dim_v": 80, "cache_dtype": "float8_e4m3fn"},
    ),
    "portable-tree": (None, {"tree": True, "seqlen_q": 7, "causal": "lower_right"}),
    "hopper-tree": ({"block_m": 128}, {"tree": True, "seqlen_q": 70}),
    "hopper-tree-shared-keys": (
        {"block_m": 64, "key_slices": 2, "num_stages": 4, "num_splits": 2},
        {"tree": True, "seqlen_q": 5, "num_heads_q": 4, "num_heads_kv": 2},
    ),
    "hopper-shared-and-split": (
        {"block_m": 64, "key_slices": 3, "num_stages": 6, "num_splits": 2},
        {"seqlen_q": 4, "causal": "lower_right"},
    ),
}


def plan_of(problem: Problem, tile: dict[str, Any] | None) -> Plan:
    if tile is None:
        return min(candidates(problem, 80), key=lambda p: (p.block_m, p.block_n))
    return make_plan(problem, tile)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_is_healthy_and_right(name: str) -> None:
    tile, fixed = FAMILIES[name]
    # Each size is another kernel to build: two a family.
    sizes = (8, 128) if name.endswith("keys") else (16, 48)
    for seed in range(SEEDS_OF_A_FAMILY):
        page_size = fixed.get("page_size", sizes[seed % 2])
        case = draw_paged_case(seed, **{**fixed, "page_size": page_size})
        if max(case.lengths) == 0:
            continue
        x = make_paged_inputs(case)
        q, k, v, *_ = x.arguments()
        problem = paged_problem(x.inputs(), Options.checked(**case.options()))
        out = torch.empty(*q.shape[:3], case.head_dim_v, dtype=q.dtype)
        lse = torch.empty(q.shape[:3])
        plan = plan_of(problem, tile)
        simulate(problem, plan, q, k, v, x.tree_mask, out, lse, None, x.others(), seed=seed)
        report = paged_error_report(out, lse, case, x)
        assert report.ok, f"{case.describe()}: {report}"
