"""The kernel configurations that are compiled ahead and checked against the resource budget.

A configuration is a Plan, and a Plan comes from a Problem, so each is derived from a problem that
stands for all of its kind, for the Hopper kernel in several sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashcore import tile_table
from flashcore.exactness import MAX_KEYS_OF_A_SUM
from flashcore.plan import KERNEL, SUPPORTED_ARCHS, Plan, candidates
from flashcore.plan_sm90 import ARCH as SM90_ARCH
from flashcore.plan_sm90 import Sm90Plan
from flashcore.problem import Problem

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
DTYPES = ("float16", "bfloat16")
# What each name stands for in a call of `attention` or, "varlen", of `attention_varlen`. "masked"
# takes everything at once, the most registers that the portable kernel can need; the Hopper kernel
# has tiles of its own for calls with neither softcap nor mask.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "options": {"window": (64, 64), "softcap": 30.0},
    "masked": {"window": (64, 64), "softcap": 30.0, "mask": "bool"},
    "varlen": {"window": (64, 64), "softcap": 30.0, "varlen": "packed"},
    "window": {"window": (64, 64)},
    "varlen-causal": {"causal": True, "varlen": "packed"},
    # Few queries for many keys, with heads folded and, where there are few, keys split over blocks.
    "decode": {"queries": 1},
    "decode-masked": {"queries": 4, "window": (64, 64), "softcap": 30.0, "mask": "bool"},
    # Mask tensors: for each query and key, with rows aligned for wide loads or not; one row of keys
    # for all queries; numbers, likewise aligned or not; keys that are no neighbours.
    "bool-mask": {"mask": "bool"},
    "loose-mask": {"mask": "loose"},
    "padding": {"mask": "padding"},
    "bias": {"mask": "bias"},
    "loose-bias": {"mask": "loose-bias"},
    "columns-mask": {"mask": "columns"},
    # A prompt's next part: more rows than a tile has, keys split none the less.
    "chunk": {"queries": 100, "causal": True},
    # More keys than one sum is exact over (tile/totals.cuh).
    "long": {"keys": 2 * MAX_KEYS_OF_A_SUM},
    # Many chunks of K, lengths, a mask and a window: the most for the Hopper kernel's producer. It
    # has head_dims of its own, and is listed beside the widest.
    "uneven": {"dims": (224, 40), "mask": "bool", "window": (64, 0), "varlen": "keys"},
}
_MASK_VARIANTS = ("bool-mask", "loose-mask", "padding", "bias", "loose-bias", "columns-mask")
_HOPPER_VARIANTS = ("window", "varlen-causal", "decode", "chunk", "uneven", *_MASK_VARIANTS)
_PORTABLE_VARIANTS = ("long",)  # the Hopper kernel's code is the same
# Of the Hopper kernel's table: from one tile to many an SM.
_HEADS = (1, 4, 16, 64, 256, 1024)
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Long enough that every window and causal mask hides something.
_SEQLEN = 1024
_GROUP = 4  # heads that share one of k and v, where queries are few


@dataclass(frozen=True, slots=True)
class Configuration:
    """A plan, the variant it was made for, and whether only the table that ships has it."""

    variant: str
    plan: Plan
    ships: bool = False

    @property
    def is_checked(self) -> bool:
        """Whether the compile gate has to see it. What ships was found to spill in neither dtype
        (tune/search.py), so one of them tells whether a change to the kernel has made it spill; how
        a mask tensor is read, or that sums begin anew, hardly depends on it."""
        one_is_enough = self.ships or self.variant in (*_MASK_VARIANTS, *_PORTABLE_VARIANTS)
        return not one_is_enough or self.plan.dtype != "float16" or self.plan.arch < 80


def configurations(
    *,
    archs: Sequence[int] = SUPPORTED_ARCHS,
    head_dims: Sequence[int] = HEAD_DIMS,
    dtypes: Sequence[str] = DTYPES,
    variants: Sequence[str] = tuple(VARIANTS),
) -> list[Configuration]:
    """Every distinct plan of these architectures, head_dims, dtypes and variants.

    Args:
        archs: 90 for sm_90.
        head_dims: of q, k and v.
        dtypes: "float16", "bfloat16" (left out below sm_80, which has none).
        variants: keys of VARIANTS.

    Returns:
        The configurations, ordered by head_dim, dtype, variant and architecture.
    """
    found: dict[Plan, Configuration] = {}
    for head_dim in head_dims:
        for dtype in dtypes:
            for variant in variants:
                if "dims" in VARIANTS[variant] and head_dim != max(HEAD_DIMS):
                    continue
                problem = _problem(head_dim, dtype, VARIANTS[variant])
                for arch in archs:
                    if dtype == "bfloat16" and arch < 80:
                        continue
                    portable = variant not in _HOPPER_VARIANTS
                    for ships in (False,) if variant in _PORTABLE_VARIANTS else (False, True):
                        for plan in _plans(problem, arch, portable, ships):
                            found.setdefault(plan, Configuration(variant, plan, ships))
    return list(found.values())


def _plans(problem: Problem, arch: int, portable: bool, ships: bool) -> Iterator[Plan]:
    """What the problem's kind may run on an architecture, by rules or, if it `ships`, by the table.
    The Hopper kernel has other tiles for other sizes, and leaves to the portable one what TMA
    cannot read."""
    if portable and not ships:
        yield candidates(problem, arch, kernel=KERNEL)[0]
    table = tile_table.read(arch) if ships else None
    if problem.seqlen_k > _SEQLEN:
        return
    if arch == SM90_ARCH and (table is not None or not ships):
        for heads, length in itertools.product(_HEADS, _LENGTHS):
            rules = candidates(_resized(problem, heads, length), arch)[0]
            for plan in [rules] if table is None else table.tiles_for(problem, rules):
                if isinstance(plan, Sm90Plan):
                    yield dataclasses.replace(  # the machine code is the same
                        plan,
                        num_splits=min(2, plan.num_splits),
                        folds_heads=int(bool(plan.constants()["FOLDED"])),
                    )


def _resized(problem: Problem, batch: int, length: int) -> Problem:
    strides, v_strides = (
        (length * dim, length * dim, dim) for dim in (problem.head_dim, problem.head_dim_v)
    )
    if problem.group_size > 1:  # as many queries and heads as ever
        _, head_stride, row_stride = problem.q_strides
        return dataclasses.replace(
            problem,
            batch=batch,
            seqlen_k=length,
            q_strides=(problem.group_size * head_stride, head_stride, row_stride),
            k_strides=strides,
            v_strides=v_strides,
        )
    total = batch * length if problem.varlen == "packed" else 0
    return dataclasses.replace(
        problem,
        batch=batch,
        seqlen_q=length,
        seqlen_k=length,
        q_strides=strides,
        k_strides=strides,
        v_strides=v_strides,
        total_q=total,
        total_k=total,
    )


def _problem(head_dim: int, dtype: str, options: dict[str, Any]) -> Problem:
    options = dict(options)
    head_dim, head_dim_v = options.pop("dims", (head_dim, head_dim))
    keys = options.pop("keys", _SEQLEN)
    x = torch.empty(1, 1, _SEQLEN, head_dim, dtype=getattr(torch, dtype))
    k, v = (x.new_empty(1, 1, keys, dim) for dim in (head_dim, head_dim_v))
    queries = options.pop("queries", None)
    q = x if queries is None else x.new_empty(1, _GROUP, queries, head_dim)
    mask = options.pop("mask", None)
    if mask is not None:
        heads, rows = (1, 1) if mask == "padding" else q.shape[1:3]
        width = _SEQLEN + mask.startswith("loose")
        element = q.dtype if mask.endswith("bias") else torch.bool
        values = torch.empty(1, heads, rows, width, dtype=element)[..., :_SEQLEN]
        options["mask"] = values.mT.contiguous().mT if mask == "columns" else values
    varlen = options.pop("varlen", "none")
    problem = Problem.from_tensors(q, k, v, **options)
    if varlen == "packed":
        problem = dataclasses.replace(problem, varlen=varlen, total_q=_SEQLEN, total_k=_SEQLEN)
    elif varlen == "keys":
        problem = dataclasses.replace(problem, varlen=varlen, diag_offset=0)
    return problem
