"""The real kernel raises no alarm, whatever the shape and the schedule, and is right.

Each family is one compiled configuration or two; lengths, heads, values, tails and the schedule are
drawn from the seed: 300 runs in all, 60 of which are not `thorough`.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import candidates
from flashcore.sim import simulate

FEW_SEEDS = 10  # of 50

# name -> (arch, what is fixed). Between them: both dtypes, one and two stages, every load
# width, head_dims that leave padding, every mask kind, both windows, softcap, views with tails.
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (80, {}),
    "bfloat16-causal": (80, {"dtype": "bfloat16", "causal": "lower_right", "layout": "bshd"}),
    "padded-dims-bool-mask": (80, {"head_dim": 40, "head_dim_v": 24, "mask": "bool"}),
    "window-softcap": (80, {"head_dim": 32, "head_dim_v": 32, "window": (9, 4), "softcap": 5.0}),
    "one-stage-narrow-loads": (75, {"offset": 1, "tail": 3, "layout": "bshd"}),
    "wide-additive-mask": (80, {"head_dim": 96, "head_dim_v": 104, "mask": "additive"}),
}


def draw_case(fixed: dict[str, Any], seed: int) -> Case:
    rng = random.Random(seed)
    heads_kv = rng.choice((1, 2))
    # Long enough for a causal mask or a window to exclude something: else another kernel serves.
    lengths = (15, 16, 17, 31, 47, 64, 65, 97, 130)
    drawn = {
        "batch": rng.choice((1, 1, 2)),
        "num_heads_kv": heads_kv,
        "num_heads_q": heads_kv * rng.choice((1, 2)),
        "seqlen_q": rng.choice(lengths if fixed.get("window") else (1, 2, 7, *lengths)),
        "seqlen_k": rng.choice((1, 2, 7, *lengths) if not fixed.get("window") else lengths),
        "tail": rng.choice((0, 2)),
    }
    return Case(**(drawn | fixed), seed=seed)


@pytest.mark.parametrize(
    "seeds",
    [range(FEW_SEEDS), pytest.param(range(FEW_SEEDS, 50), marks=pytest.mark.thorough)],
    ids=["few seeds", "many seeds"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_is_healthy_and_right(name: str, seeds: range) -> None:
    arch, fixed = FAMILIES[name]
    for seed in seeds:
        case = draw_case(fixed, seed)
        x = make_inputs(case)
        problem = Problem.from_tensors(
            x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options()
        )
        # The smallest tiles: most steps of the loop over keys for a length, and one plan a family.
        plan = min(candidates(problem, arch), key=lambda p: (p.block_m, p.block_n, -p.num_stages))
        out = torch.empty(*x.q.shape[:3], case.head_dim_v, dtype=case.torch_dtype)
        lse = torch.empty(x.q.shape[:3])
        report = simulate(problem, plan, x.q, x.k, x.v, x.mask, out, lse, seed=seed)
        assert report.switches > 0
        errors = error_report(out, x.q, x.k, x.v, lse=lse, mask=x.mask, **case.options())
        assert errors.ok, f"{case.describe()}: {errors}\n{dataclasses.asdict(case)}"
