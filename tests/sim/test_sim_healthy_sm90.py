"""The Hopper kernel raises no alarm, whatever the shape and the schedule, and is right; see
test_sim_healthy.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_sim_healthy import draw_case

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.kernels.fwd_sm90 import params as params_sm90
from flashcore.kernels.fwd_sm90.candidates import traits_sm90
from flashcore.kernels.fwd_sm90.plan import ARCH, KERNEL, Sm90Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim import simulate

pytestmark = pytest.mark.thorough

SEEDS_OF_A_FAMILY = 32

# name -> (tile, what is fixed). Between them: one to three consumers, taking turns or not, one or
# two buffers for Q, O in one part or several, both swizzles, every mask kind, both windows,
# softcap, empty rows; column chunks of which a part is padding; keys shared by two consumers, of
# which one may have none.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"block_m": 128, "ping_pong": True, "q_buffers": 2}, {}),
    "causal": (
        {"block_m": 64, "o_parts": 2},
        {"dtype": "bfloat16", "causal": "lower_right", "layout": "bshd"},
    ),
    "three-consumers-bool-mask": (
        {"block_m": 192, "ping_pong": True, "q_buffers": 2, "num_stages": 3},
        {"mask": "bool", "causal": "upper_left"},
    ),
    "window-softcap": (
        {"block_m": 128, "ping_pong": True, "o_parts": 2, "lazy_rescale": False},
        {"head_dim": 128, "head_dim_v": 128, "window": (40, 20), "softcap": 5.0},
    ),
    "padded-dims-additive-mask": (
        {"block_m": 64},
        {"head_dim": 40, "head_dim_v": 48, "mask": "additive"},
    ),
    "narrow-chunks": (
        {"block_m": 128, "ping_pong": False, "block_n": 64, "o_parts": 4},
        {"head_dim": 96, "head_dim_v": 80, "causal": "lower_right"},
    ),
    "shared-keys": ({"block_m": 64, "key_slices": 2, "num_stages": 4}, {"dtype": "bfloat16"}),
    "shared-keys-causal": (
        {"block_m": 64, "key_slices": 2, "num_stages": 4, "lazy_rescale": False},
        {"causal": "lower_right", "head_dim": 40, "head_dim_v": 72},
    ),
    "shared-keys-window": (
        {"block_m": 64, "key_slices": 2, "num_stages": 6},
        {"window": (30, 9), "mask": "additive"},
    ),
}


def make_plan(problem: Problem, tile: dict[str, Any]) -> Sm90Plan:
    """Return a plan with short key tiles: more steps of the loop over keys for a length."""
    plan = Sm90Plan(
        kernel=KERNEL,
        arch=ARCH,
        block_m=64,
        block_n=32,
        num_stages=2,
        min_blocks=1,
        **traits_sm90(problem),
    )
    return dataclasses.replace(plan, **tile)


@pytest.mark.parametrize("seed_block", range(2))
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_is_healthy_and_right(name: str, seed_block: int) -> None:
    tile, fixed = FAMILIES[name]
    half = SEEDS_OF_A_FAMILY // 2
    for seed in range(seed_block * half, (seed_block + 1) * half):
        run(draw_case(fixed, seed), tile, seed)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8])
def test_whatever_number_of_heads_makes_a_group(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight heads of six row tiles for three blocks; the last group takes the rest."""
    monkeypatch.setattr(params_sm90, "heads_per_section", lambda *_: heads)
    for seed in range(4):
        case = Case(
            batch=2,
            num_heads_q=4,
            num_heads_kv=2,
            seqlen_q=290 + seed,
            seqlen_k=270,
            head_dim=32,
            head_dim_v=32,
            causal="lower_right",
            seed=seed,
        )
        run(case, {"block_m": 64}, seed)


def run(case: Case, tile: dict[str, Any], seed: int) -> None:
    """Check that there is neither an alarm nor a wrong result."""
    x = make_inputs(case)
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options())
    # A bound that excludes nothing is dropped from the problem, and a block loops over less.
    plan = make_plan(problem, tile)
    out = torch.empty(*x.q.shape[:3], case.head_dim_v, dtype=case.torch_dtype)
    lse = torch.empty(x.q.shape[:3])
    report = simulate(problem, plan, x.q, x.k, x.v, x.mask, out, lse, seed=seed)
    assert report.async_copies > 0
    errors = error_report(out, x.q, x.k, x.v, lse=lse, mask=x.mask, **case.options())
    assert errors.ok, f"{case.describe()}: {errors}\n{dataclasses.asdict(case)}"
