"""List the configurations of the backward kernels that are checked against the resource budget.

They are derived from the same problems as those of the forward (configurations.py). Variants that
differ in the number of queries or keys are left out, as tiles depend on it only where they are few
(_BATCHES); they do on a mask's elements and rows and on the options beside it, so there are more of
those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from flashcore.kernels.bwd_mask_sm90.plan import MaskPlan, select_mask_plan
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.plan import ARCH, obstacle_anywhere, select_plans
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection.configurations import (
    ALL_OPTIONS,
    DTYPES,
    HEAD_DIMS,
    SERVING_VARIANTS,
    VARIANTS,
    Configuration,
    Dims,
    problem_of,
)

# Masks have elements of three kinds (bool, of q, float32) and rows of three (aligned, loose, one
# for all queries), and tiles differ without a bound, with one, and with soft-capping: with VARIANTS
# these are every two of them together, and all elements in loose rows, which take the most
# registers, with the most options.
MASK_VARIANTS: dict[str, dict[str, Any]] = {
    "loose-float-bias": {"mask": "loose-float-bias"},
    "causal-loose-mask": {"causal": True, "mask": "loose-mask"},
    "causal-padding-bias": {"causal": True, "mask": "padding-bias"},
    "causal-float-bias": {"causal": True, "mask": "float-bias"},
    "masked-loose": {**ALL_OPTIONS, "mask": "loose-mask"},
    "biased-loose": {**ALL_OPTIONS, "mask": "loose-bias"},
    "float-biased-loose": {**ALL_OPTIONS, "mask": "loose-float-bias"},
    "float-biased-row": {**ALL_OPTIONS, "mask": "loose-padding-float-bias"},
}
# Tiles of packed sequences and of seqlens_k differ with a window, too, and where the slopes of
# soft-capping lie differs without one.
_OTHERS = ("varlen-full", "varlen-window", "softcap", "causal-softcap")
BACKWARD_VARIANTS = VARIANTS | MASK_VARIANTS | {name: SERVING_VARIANTS[name] for name in _OTHERS}
# With those, tiles so few that all run at the same time, a few an SM, and many.
_BATCHES = (1, 16, 1024)
_WITH_MASKS = tuple(name for name, options in BACKWARD_VARIANTS.items() if "mask" in options)
_ANY_ORDER = "-any-order"
_BY_ONE_KERNEL = ("full", "causal", "window", "softcap", "causal-softcap")
# Widths between those of HEAD_DIMS, and the variants that are tried there: where columns of a tile
# lie behind head_dim, and at the edges of rules for tiles.
_OTHER_HEAD_DIMS: dict[Dims, tuple[str, ...]] = {
    40: (*_BY_ONE_KERNEL, *_WITH_MASKS),
    56: _BY_ONE_KERNEL,
    72: (*_BY_ONE_KERNEL, *_WITH_MASKS),
    104: _BY_ONE_KERNEL,
    160: _WITH_MASKS,
}


def _mask_plans(problem: Problem) -> list[MaskPlan]:
    """Return the plans of the gradient of a problem's additive mask: of each query and key, and of
    one row; summed by one block and by several, of which one has rows of an odd length, where they
    are loose."""
    if problem.mask is None or problem.mask.dtype == "bool" or problem.varlen != "none":
        return []
    of_dq = select_plans(problem).dq
    is_loose = of_dq.mask_is_shifted or of_dq.mask_load_bytes < 16
    rows = 1 if problem.mask.strides[2] == 0 else problem.seqlen_q
    plans = []
    for num_shares, length in ((1, problem.seqlen_k - is_loose), (2, problem.seqlen_k)):
        shorter = dataclasses.replace(problem, seqlen_k=length)
        plan = select_mask_plan(shorter, (1, 1, rows, length)).machine_code()
        plans.append(dataclasses.replace(plan, num_shares=num_shares))
    return plans


def backward_configurations(
    *,
    archs: Sequence[int] = (ARCH,),
    head_dims: Sequence[Dims] | None = None,
    dtypes: Sequence[str] = DTYPES,
    variants: Sequence[str] = tuple(BACKWARD_VARIANTS),
) -> list[Configuration]:
    """Return every distinct plan of the backward kernels.

    Args:
        archs: 90 for sm_90; others have no such kernels.
        head_dims: of q, k and v; by default HEAD_DIMS, and some variants of others.
        dtypes: "float16", "bfloat16".
        variants: keys of BACKWARD_VARIANTS. One of packed sequences stands for seqlens_k, too.

    Returns:
        The configurations, ordered by head_dim, dtype and variant. Those of the kernel that adds
        to dq in any order are a variant of their own, so that the sample has some.
    """
    found: dict[Plan, Configuration] = {}
    if ARCH not in archs:
        return []
    for head_dim, dtype, variant in _kinds(head_dims, dtypes, variants):
        options = BACKWARD_VARIANTS[variant]
        kinds = [options]
        if options.get("varlen") == "packed":
            kinds.append(options | {"varlen": "keys"})
        for kind in kinds:
            problem = problem_of(head_dim, dtype, kind)
            by_two = head_dims is not None or head_dim in HEAD_DIMS
            for suffix, plan in _plans_of(problem, by_two):
                found.setdefault(plan, Configuration(variant + suffix, plan))
    return list(found.values())


def _kinds(
    head_dims: Sequence[Dims] | None, dtypes: Sequence[str], variants: Sequence[str]
) -> Iterator[tuple[Dims, str, str]]:
    """Return head_dims, dtypes and variants as `backward_configurations` takes them, together."""
    tried = dict.fromkeys(HEAD_DIMS if head_dims is None else head_dims, tuple(BACKWARD_VARIANTS))
    if head_dims is None:
        tried |= _OTHER_HEAD_DIMS
    for head_dim, names in tried.items():
        for dtype in dtypes:
            for variant in variants:
                options = BACKWARD_VARIANTS[variant]
                if variant not in names or "queries" in options or "keys" in options:
                    continue
                if "dims" not in options or head_dim == max(HEAD_DIMS):
                    yield head_dim, dtype, variant


def _plans_of(problem: Problem, by_two: bool) -> list[tuple[str, Plan]]:
    """Return the plans of both designs: of two kernels, if asked for or if there is a mask, and of
    one where it takes the problem, with sums of dq in their order and, where that may be chosen, in
    any; each behind what its variant's name ends with."""
    if obstacle_anywhere(problem) is not None:
        return []
    plans: list[Plan] = []
    if by_two or problem.mask is not None:
        for batch in _BATCHES:
            plans += select_plans(dataclasses.replace(problem, batch=batch))
        plans += _mask_plans(problem)
    if plan_one.obstacle(problem) is None:
        in_order = plan_one.select_one_kernel_plans(problem)
        plans += in_order
        if plan_one.any_order_may_pay(problem):
            delta, main, rounding = plan_one.in_any_order(in_order)
            others = [(_ANY_ORDER, main), ("", delta), ("", rounding)]
            return [("", plan) for plan in plans] + others
    return [("", plan) for plan in plans]
