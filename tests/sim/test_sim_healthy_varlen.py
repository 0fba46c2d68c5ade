"""Both kernels on sequences of different lengths raise no alarm, whatever the lengths and the
schedule, are right, and leave their counter at 0; see test_sim_healthy.py."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_sim_healthy_sm90 import make_plan

from flashcore.backends.packed import as_batch, packed_problem
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs, varlen_error_report
from flashcore.checks.varlen_cases import draw_varlen_case as draw
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection.select import candidates
from flashcore.sim import simulate

pytestmark = pytest.mark.thorough

SEEDS_OF_A_FAMILY = 16

# name -> (tile of the Hopper kernel or None for the portable one, what is fixed).
FAMILIES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "portable-causal": (None, {"causal": "lower_right", "dtype": "bfloat16"}),
    "portable-window": (None, {"window": (20, 9), "softcap": 5.0, "head_dim": 40}),
    "hopper-one-consumer": ({"block_m": 64, "o_parts": 2}, {"causal": "lower_right"}),
    "hopper-two-consumers": (
        {"block_m": 128, "ping_pong": True},
        {"window": (20, 9), "dtype": "bfloat16"},
    ),
    "hopper-three-consumers": ({"block_m": 192, "ping_pong": True}, {"causal": "upper_left"}),
    "hopper-shared-keys": (
        {"block_m": 64, "key_slices": 2, "num_stages": 4},
        {"causal": "lower_right", "dtype": "bfloat16"},
    ),
    "hopper-many-sequences": ({"block_m": 64}, {}),
    "hopper-folded-heads": ({"block_m": 64}, {"causal": "lower_right"}),
    "hopper-folded-heads-in-turns": ({"block_m": 128, "ping_pong": True}, {"window": (20, 9)}),
    "hopper-ranges": (
        {"stream_k": True},
        {"softcap": 5.0, "layout": "apart", "num_heads_q": 2, "num_heads_kv": 2},
    ),
    "hopper-many-sequences-in-ranges": ({"stream_k": True}, {}),
    "hopper-folded-heads-in-ranges": ({"stream_k": True}, {"causal": "lower_right"}),
    "hopper-folded-heads-in-wide-ranges": (
        {"block_m": 128, "ping_pong": True, "stream_k": True},
        {"dtype": "bfloat16"},
    ),
    "hopper-folded-heads-shared-keys-in-ranges": (
        {"key_slices": 2, "num_stages": 4, "stream_k": True},
        {"causal": "upper_left"},
    ),
}


def draw_case(name: str, fixed: dict[str, Any], seed: int) -> VarlenCase:
    """Draw a case long enough that a bound excludes something: else another kernel serves."""
    rng = random.Random(seed)
    if "many-sequences" in name:  # more than the scheduler looks at together
        lengths = tuple(
            rng.choice((0, 0, 0, 1, 3, 40)) for _ in range(rng.choice((31, 32, 33, 70)))
        )
        return draw(seed, lengths_q=(*lengths, 9), lengths_k=(*lengths, 65), layout="apart")
    if "folded" in name:  # few queries beside their keys, in groups that divide 64 or do not
        group, few = rng.choice((2, 3, 5, 7, 8, 16)), (0, 1, 1, 2, 9, 22)
        counts = tuple(rng.choice(few) for _ in range(rng.choice((1, 3, 6))))
        longest = 900 if "ranges" in name else 100  # ranges have 16 key tiles at least
        keys = tuple(rng.choice((0, 7, 33, 64, longest)) for _ in counts)
        return draw(
            seed, **fixed, lengths_q=(*counts, 13), lengths_k=(*keys, 4 * sum(counts) + 64),
            num_heads_q=2 * group, num_heads_kv=2, head_dim=32, head_dim_v=40, layout="apart",
            tail=rng.choice((0, 2)),
        )  # fmt: skip
    case = draw(seed, **fixed)
    longest = 900 if "ranges" in name else 65
    one_more = {"lengths_q": (*case.lengths_q, 65), "lengths_k": (*case.lengths_k, longest)}
    return draw(seed, **fixed, **one_more)


def plan_of(problem: Problem, tile: dict[str, Any] | None) -> Plan:
    if tile is None:
        return min(candidates(problem, 80), key=lambda p: (p.block_m, p.block_n))
    return make_plan(problem, tile)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_is_healthy_and_right(name: str) -> None:
    tile, fixed = FAMILIES[name]
    if "head_dim" in fixed:
        fixed = {**fixed, "head_dim_v": fixed["head_dim"]}
    for seed in range(SEEDS_OF_A_FAMILY):
        case = draw_case(name, fixed, seed)
        x = make_varlen_inputs(case)
        problem = packed_problem(*x.arguments(), **case.options())
        out = torch.empty(problem.total_q, case.num_heads_q, case.head_dim_v, dtype=x.q.dtype)
        lse = torch.empty(case.num_heads_q, problem.total_q)
        lengths = {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
        q, k, v = (as_batch(t) for t in (x.q, x.k, x.v))
        plan = plan_of(problem, tile)
        assert (plan.folds_heads > 0) == ("folded" in name)
        simulate(problem, plan, q, k, v, None, out, lse, None, lengths, seed=seed)
        report = varlen_error_report(out, lse, case, x)
        assert report is None or report.ok, f"{case.describe()}: {report}"
