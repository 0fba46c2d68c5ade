"""Test how masks come to the scores of the backward kernels for Hopper, in the simulator: whatever
their dtype is, what they are broadcast over, and where their rows begin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from parameters import thorough_but
from test_backward_sm90 import SMALL, TWO, plans_of

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.kernels.bwd_sm90.plan import select_plans
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.kernels.limits import smem_limits
from flashcore.problem import Problem
from flashcore.sim.run_bwd import simulate_backward

F16, BF16, F32, BOOL = torch.float16, torch.bfloat16, torch.float32, torch.bool
ROLES = BwdTile(64, 32, 2, 1), BwdTile(32, 64, 2, 2)
# name -> the mask's dimensions (1: broadcast), its dtype, lengths, head_dim, options, tiles (None:
# those that are selected). Rows of 150 elements begin at multiples of 4 bytes, of 151 anywhere.
CASES: dict[str, tuple[Any, ...]] = {
    "in-packets": ("1hqk", F16, (130, 152), 32, {}, TWO),
    "in-words": ("bhqk", F32, (70, 150), 32, {"causal": True}, SMALL),
    "shifted": ("1hqk", BF16, (100, 151), 32, {"causal": "upper_left"}, SMALL),
    "bool-shifted": ("b1qk", BOOL, (70, 151), 32, {}, SMALL),
    "one-row": ("b11k", BOOL, (130, 150), 32, {"causal": True}, TWO),
    "one-column": ("1hq1", F16, (70, 90), 32, {}, SMALL),
    "by-columns": ("qk", BF16, (70, 90), 32, {"window": (30, 9)}, SMALL),
    "two-warpgroups": ("1hqk", F16, (70, 150), 136, {"softcap": 4.0}, ROLES),
    "two-warpgroups-row": ("111k", F32, (70, 90), 136, {"causal": True}, ROLES),
    "selected": ("11qk", BOOL, (130, 160), 64, {"causal": True}, None),
}


# Every dtype and the tiles that differ most stay in the fast run; a second each.
CHEAP = "bool-shifted", "two-warpgroups-row"


@pytest.mark.parametrize("name", thorough_but(CHEAP, CASES))
def test_masks_of_every_kind(name: str) -> None:
    dims, dtype, (rows, keys), head_dim, options, tiles = CASES[name]
    generator = torch.Generator().manual_seed(0)
    of_q = dtype if dtype == BF16 else F16

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    q = normal(2, 2, rows, head_dim).to(of_q)
    k, v = (normal(2, 1, keys, head_dim).to(of_q) for _ in range(2))
    sizes = {"b": 2, "h": 2, "q": rows, "k": keys, "1": 1}
    mask = normal(*[sizes[d] for d in dims])
    if "q" in dims:
        mask[..., rows // 2, :] = -math.inf
    mask = mask > -1.0 if dtype == BOOL else mask.to(dtype)
    if dims == "qk":
        mask = mask.t().contiguous().t()
    problem, out, lse = forward(q, k, v, mask, options)
    empty = lse == -math.inf
    dout = normal(*out.shape).to(of_q).masked_fill(empty[..., None], math.nan)

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors, seed=1)

    inputs = q, k, v, mask
    plans = plans_of(problem, tiles)
    found = fused_backward(problem, *inputs, out, lse, dout, None, run, plans)
    assert not wrong_gradients(found, *inputs, dout, None, options, out)


@pytest.mark.parametrize("dtype", [BOOL, BF16, F32])
def test_tiles_fit_with_every_head_dim(dtype: torch.dtype) -> None:
    limit = smem_limits(90)[0]
    mask = torch.empty(64, 64, dtype=dtype)
    for head_dim in range(8, 264, 8):
        x = torch.empty(1, 1, 64, head_dim, dtype=BF16)
        for head_dim_v in (head_dim, 8, 256):
            v = torch.empty(1, 1, 64, head_dim_v, dtype=BF16)
            for options in ({}, {"causal": True}, {"softcap": 5.0}):
                problem = Problem.from_tensors(x, x, v, mask=mask, **options)
                for plan in select_plans(problem):
                    assert plan.smem_bytes <= limit, plan.describe()
