"""List the configurations of the backward kernels that are checked against the resource budget.

They are derived from the same problems as those of the forward (configurations.py). Their
tiles do not depend on the number of queries or keys, so variants that differ in it are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flashcore.kernels.bwd_mask_sm90.plan import MaskPlan, select_mask_plan
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.plan import ARCH, obstacle_anywhere, select_plans
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection.configurations import (
    DTYPES,
    HEAD_DIMS,
    VARIANTS,
    Configuration,
    Dims,
    problem_of,
)


def _mask_plans(problem: Problem) -> list[MaskPlan]:
    """Return the plans of the gradient of a problem's additive mask: of each query and key, and of
    one row; summed by one block and by several."""
    if problem.mask is None or problem.mask.dtype == "bool" or problem.varlen != "none":
        return []
    rows = 1 if problem.mask.strides[2] == 0 else problem.seqlen_q
    plan = select_mask_plan(problem, (1, 1, rows, problem.seqlen_k))
    return [dataclasses.replace(plan.machine_code(), num_shares=n) for n in (1, 2)]


def backward_configurations(
    *,
    archs: Sequence[int] = (ARCH,),
    head_dims: Sequence[Dims] = HEAD_DIMS,
    dtypes: Sequence[str] = DTYPES,
    variants: Sequence[str] = tuple(VARIANTS),
) -> list[Configuration]:
    """Return every distinct plan of the backward kernels.

    Args:
        archs: 90 for sm_90; others have no such kernels.
        head_dims: of q, k and v.
        dtypes: "float16", "bfloat16".
        variants: keys of VARIANTS. A variant of packed sequences stands for seqlens_k, too.

    Returns:
        The configurations, ordered by head_dim, dtype and variant.
    """
    found: dict[Plan, Configuration] = {}
    if ARCH not in archs:
        return []
    for head_dim in head_dims:
        for dtype in dtypes:
            for variant in variants:
                options = VARIANTS[variant]
                if "queries" in options or "keys" in options:
                    continue
                if "dims" in options and head_dim != max(HEAD_DIMS):
                    continue
                kinds = [options]
                if options.get("varlen") == "packed":
                    kinds.append(options | {"varlen": "keys"})
                for kind in kinds:
                    problem = problem_of(head_dim, dtype, kind)
                    for plan in _plans_of(problem):
                        found.setdefault(plan, Configuration(variant, plan))
    return list(found.values())


def _plans_of(problem: Problem) -> list[Plan]:
    """Return the plans of both designs, of the second where it takes the problem."""
    if obstacle_anywhere(problem) is not None:
        return []
    plans: list[Plan] = [*select_plans(problem), *_mask_plans(problem)]
    if plan_one.obstacle(problem) is None:
        plans += plan_one.select_one_kernel_plans(problem)
    return plans
