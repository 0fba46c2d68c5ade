"""Test masks where one kernel for Hopper computes dq, dk and dv, in the simulator: every dtype and
place in memory, heads of a group with masks of their own, and where queries are walked over from
the last tile on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from parameters import thorough_but

from flashcore.backends import readable
from flashcore.backends.backward_sm90 import fused_backward
from flashcore.kernels.bwd_sm90.plan_one import HEAD_DIM_MAX, obstacle, select_one_kernel_plans
from flashcore.kernels.limits import smem_limits
from flashcore.problem import Problem
from flashcore.sim.run_bwd import simulate_backward

F16, BF16, F32, BOOL = torch.float16, torch.bfloat16, torch.float32, torch.bool
# name -> the mask's dimensions (1: broadcast), its dtype, heads of k and v, lengths, head_dim,
# options. Rows of 150 elements begin at multiples of 4 bytes, of 151 anywhere.
CASES: dict[str, tuple[Any, ...]] = {
    "grouped": ("1hqk", BF16, 1, (150, 152), 32, {"causal": True}),
    "in-packets": ("bhqk", F16, 2, (200, 152), 64, {}),
    "in-words": ("bhqk", F32, 2, (140, 150), 48, {"causal": "upper_left"}),
    "shifted": ("1hqk", BF16, 1, (140, 151), 64, {}),
    "bool-shifted": ("b1qk", BOOL, 2, (70, 151), 32, {"window": (60, 9)}),
    "one-row": ("b11k", BOOL, 2, (200, 150), 64, {}),
    "one-column": ("1hq1", F16, 1, (140, 90), 32, {}),
    "wider": ("b1qk", BOOL, 2, (140, 144), 80, {"causal": True}),
    "wider-additive": ("1hqk", BF16, 2, (140, 144), 96, {}),
    "shared": ("1hqk", BOOL, 1, (140, 150), 128, {}),
    "shared-causal": ("bhqk", BOOL, 1, (140, 160), 104, {"causal": True}),
    "padded": ("11qk", BOOL, 2, (140, 144), 72, {}),
}


@pytest.mark.parametrize("name", thorough_but(("grouped",), CASES))
def test_masks_of_every_kind(name: str) -> None:
    dims, dtype, heads_kv, (rows, keys), head_dim, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    of_q = dtype if dtype == BF16 else F16

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    q = normal(2, 2, rows, head_dim).to(of_q)
    k, v = (normal(2, heads_kv, keys, head_dim).to(of_q) for _ in range(2))
    sizes = {"b": 2, "h": 2, "q": rows, "k": keys, "1": 1}
    mask = normal(*[sizes[d] for d in dims])
    if "q" in dims:
        mask[..., rows // 2, :] = -math.inf
    mask = mask > -1.0 if dtype == BOOL else mask.to(dtype)
    problem, out, lse = forward(q, k, v, mask, options)
    empty = lse == -math.inf
    dout = normal(*out.shape).to(of_q).masked_fill(empty[..., None], math.nan)
    inputs = q, k, v, mask
    for seed in range(2):

        def run(problem, plan, tensors, seed=seed) -> None:
            simulate_backward(problem, plan, tensors, seed=seed)

        plans = select_one_kernel_plans(problem)
        found = fused_backward(problem, *inputs, out, lse, dout, None, run, plans)
        assert not wrong_gradients(found, *inputs, dout, None, options, out)


@pytest.mark.parametrize("dtype", [BOOL, BF16, F32])
def test_tiles_fit_with_every_head_dim(dtype: torch.dtype) -> None:
    limit = smem_limits(90)[0]
    mask = torch.empty(64, 64, dtype=dtype)
    found = 0
    for head_dim in range(8, HEAD_DIM_MAX + 16, 8):
        x = torch.empty(1, 1, 64, head_dim, dtype=BF16)
        for head_dim_v in (head_dim, 8, 64, 96, 128):
            v = torch.empty(1, 1, 64, head_dim_v, dtype=BF16)
            for options in ({}, {"causal": True}):
                problem = Problem.from_tensors(x, x, v, mask=mask, **options)
                if obstacle(problem) is None:
                    main = select_one_kernel_plans(problem).main
                    assert main.smem_bytes <= limit, main.describe()
                    found += 1
    assert found > 40


def test_a_shared_mask_of_unaligned_rows_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all heads; one that each head has of its own is read where it is."""
    monkeypatch.setattr(readable, "_MANY_SCORES", 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 2, 70, 32, generator=generator).to(F16) for _ in range(4))
    wide = torch.randn(2, 2, 70, 81, generator=generator).to(F16)
    for mask, is_copied in (
        (wide[:1, :1, :, 3:73].expand(2, 2, 70, 70), True),
        (wide[1, 1, :, 3:73], True),
        (wide[:, :, :, 3:73], False),
        (wide[:1, :1, :, :70].contiguous(), True),
        (torch.cat((wide, wide), -1)[:1, :1, :, :160].contiguous()[..., :70], False),
    ):
        problem, out, lse = forward(q, k, v, mask, {})
        read = []

        def run(problem, plan, tensors, read=read) -> None:
            read.append((problem.mask, tensors["mask"]))
            simulate_backward(problem, plan, tensors)

        found = fused_backward(problem, q, k, v, mask, out, lse, dout, None, run)
        assert not wrong_gradients(found, q, k, v, mask, dout, None, {}, out)
        assert all((x.data_ptr() != mask.data_ptr()) == is_copied for _, x in read)
        assert all(spec.load_bytes == 16 for spec, _ in read if is_copied)
