"""Tiles of caches of 8 bits: whether warps share them, or a warpgroup converts them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flashcore.checks.paged_cases import PagedCase, make_paged_inputs
from flashcore.kernels.fwd_sm90.kernel import SM90
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.ops.paged import paged_problem
from flashcore.problem.options import Options
from flashcore.selection.select import select_plan


def plan_of(gate: str | None = None, **options: Any) -> Sm90Plan:
    fields = {"lengths": (40,), "cache_dtype": "float8_e4m3fn", "num_heads_q": 8} | options
    case = PagedCase(**{"num_heads_kv": 2} | fields)
    problem = paged_problem(make_paged_inputs(case).inputs(), Options.checked(**case.options()))
    plan = select_plan(problem, 90, gate=gate, kernel=SM90.name)
    assert isinstance(plan, Sm90Plan)
    assert SM90.is_legal(plan)
    return plan


@pytest.mark.parametrize(
    ("strips", "options"),
    [
        (1, {"seqlen_q": 1}),
        (1, {"seqlen_q": 2, "head_dim": 256, "head_dim_v": 256}),
        (1, {"seqlen_q": 1, "head_dim": 96}),  # rows of 96 bytes, in chunks of 128
        (2, {"seqlen_q": 4, "head_dim": 192, "head_dim_v": 64}),
        (4, {"seqlen_q": 8, "head_dim": 128, "head_dim_v": 128, "causal": "lower_right"}),
        (0, {"seqlen_q": 2, "tree": True}),
        (0, {"seqlen_q": 9}),
        (0, {"seqlen_q": 8, "head_dim": 192}),  # a warp would convert all keys for 8 rows
        (0, {"seqlen_q": 1, "gate": "qk"}),
        (0, {"seqlen_q": 1, "cache_dtype": ""}),
    ],
)
def test_warps_share_the_keys_of_few_rows(strips: int, options: dict[str, Any]) -> None:
    plan = plan_of(**options)
    assert plan.strips == strips
    assert plan.converts == (plan.has_float8 and strips == 0)
    assert plan.block_m == 8 * strips or strips == 0
    assert plan.min_blocks == 2 or strips == 0 or plan.head_dim > 128


def test_a_plan_has_warps_that_convert_or_share() -> None:
    plan = plan_of(seqlen_q=1)
    changes = (
        *({"strips": 0}, {"strips": 3}, {"load_stages": 2}, {"block_n": 96}, {"block_m": 64}),
        *({"gate": "qk"}, {"cache_dtype": ""}, {"q_buffers": 1}, {"strips": 2}),
        *({"mask": "bool"}, {"varlen": "packed_pages"}),
    )
    for fields in changes:
        assert not SM90.is_legal(dataclasses.replace(plan, **fields)), fields
