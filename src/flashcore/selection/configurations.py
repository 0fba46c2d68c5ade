"""List the kernel configurations that are compiled ahead and checked against the resource budget.

A configuration is a Plan, and a Plan comes from a Problem, so each is derived from a problem that
stands for all of its kind, for the Hopper kernel in several sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.kernels.fwd_wmma.plan import SUPPORTED_ARCHS, Plan
from flashcore.kernels.registry import PORTABLE, forward_for, forward_of
from flashcore.problem import Problem, widest_band
from flashcore.problem.exactness import MAX_KEYS_OF_A_SUM
from flashcore.problem.memory_layout import mask_spec
from flashcore.problem.problem import PACKS_QUERIES
from flashcore.selection import tile_table
from flashcore.selection.select import candidates

Dims = int | tuple[int, int]  # head_dim of q, k and v; or of q and k, and of v
Sizes = tuple[tuple[int, int], ...]  # heads and lengths
HEAD_DIMS: tuple[Dims, ...] = (32, 64, 80, 96, 128, 192, 256)
DTYPES = ("float16", "bfloat16")
_IN_PAGES = {"varlen": "packed_pages", "page_size": 16}
_FLOAT8 = {"varlen": "pages", "page_size": 16, "cache_dtype": "float8_e4m3fn"}
# The options that each name stands for, of `attention` or ("varlen") `attention_varlen`. "masked"
# takes the most registers that the portable kernel can need; the Hopper kernel has other tiles.
ALL_OPTIONS: dict[str, Any] = {"window": (64, 64), "softcap": 30.0}
_TREES = {**ALL_OPTIONS, "mask": "tree"}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "options": ALL_OPTIONS,
    "masked": {**ALL_OPTIONS, "mask": "bool"},
    "varlen": {**ALL_OPTIONS, "varlen": "packed"},
    "window": {"window": (64, 64)},
    "varlen-causal": {"causal": True, "varlen": "packed"},
    # Few queries for many keys, with heads folded and, where there are few, keys split over blocks.
    "decode": {"queries": 1},
    "decode-masked": {"queries": 4, **ALL_OPTIONS, "mask": "bool"},
    # The same cut by the device (tile/stream_k.cuh): keys in one piece or in pages, equal pieces.
    "cut": {"queries": 4, **ALL_OPTIONS, "varlen": "keys"},
    "cut-plain": {"queries": 1, "varlen": "keys"},
    "cut-pages": {"queries": 4, "causal": True, "varlen": "pages", "page_size": 16},
    "cut-invariant": {"queries": 4, "causal": True, "varlen": "keys", "batch_invariant": True},
    # Mask tensors: for each query and key, with rows aligned for wide loads or not; one row of keys
    # for all queries; numbers, with rows that are aligned or not; keys that are no neighbours.
    "bool-mask": {"mask": "bool"},
    "loose-mask": {"mask": "loose"},
    "padding": {"mask": "padding"},
    "bias": {"mask": "bias"},
    "loose-bias": {"mask": "loose-bias"},
    "float-bias": {"mask": "float-bias"},
    "columns-mask": {"mask": "columns"},
    # A prompt's next part: more rows than a tile has, keys split none the less.
    "chunk": {"queries": 100, "causal": True},
    # More keys than one sum is exact over (fwd_wmma/totals_wmma.cuh).
    "long": {"keys": 2 * MAX_KEYS_OF_A_SUM},
    "max-score": {"causal": True, "return_max_score": True},
    # The most for the Hopper kernel's producer; of its own head_dims, listed beside the widest.
    "uneven": {"dims": (224, 40), "mask": "bool", "window": (64, 0), "varlen": "keys"},
    # Lanes that find pages take registers of the producer, and with a mask of the consumers.
    "pages-masked": {**ALL_OPTIONS, "mask": "bool", "varlen": "pages", "page_size": 16},
    "packed-pages": {**ALL_OPTIONS, "varlen": "packed_pages", "page_size": 16},
    "tree": {"queries": 64, **_TREES, "varlen": "pages", "page_size": 16},
    # Packed queries that are few, with heads folded (tile/folded_rows.cuh): decodes, a mixed batch.
    "packed-decode": {"queries": 1, "causal": True, **_IN_PAGES},
    "packed-mixed": {"queries": 40, **ALL_OPTIONS, **_IN_PAGES},
    "packed-few": {"queries": 40, "causal": True, "varlen": "packed"},
    # Few of them, whose keys the device cuts: in pages or one piece, more than one sum goes over.
    "packed-cut": {"queries": 4, **ALL_OPTIONS, **_IN_PAGES},
    "packed-float8": {"queries": 1, **ALL_OPTIONS, **_FLOAT8, "varlen": "packed_pages"},
    "packed-float8-more": {"queries": 40, **ALL_OPTIONS, **_FLOAT8, "varlen": "packed_pages"},
    "packed-drafts": {"queries": 4, "keys": 4096, **ALL_OPTIONS, "varlen": "packed"},
    "packed-trees": {"queries": 40, **_TREES, **_IN_PAGES},
    "packed-trees-cut": {"queries": 4, **_TREES, **_IN_PAGES},
    "packed-trees-float8": {"queries": 1, **_TREES, **_FLOAT8, "varlen": "packed_pages"},
    "packed-long": {"queries": 4, "keys": 2 * MAX_KEYS_OF_A_SUM, **ALL_OPTIONS, **_IN_PAGES},
    "float8-decode": {"queries": 1, **_FLOAT8},
    "float8-drafts": {"queries": 8, **ALL_OPTIONS, **_FLOAT8},
    "float8-few": {"queries": 4, **ALL_OPTIONS, **_FLOAT8},
    "float8-chunk": {"queries": 100, "causal": True, **_FLOAT8},
}
# A bundle holds these as well; they take no more registers than one of the above.
SERVING_VARIANTS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 30.0},
    "causal-softcap": {"causal": True, "softcap": 30.0},
    "causal-padding": {"causal": True, "mask": "padding"},
    "loose-padding": {"mask": "loose-padding"},
    "causal-loose-padding": {"causal": True, "mask": "loose-padding"},
    "padding-bias": {"mask": "padding-bias"},
    "decode-window": {"queries": 1, "window": (511, 0)},
    "decode-softcap": {"queries": 1, "softcap": 30.0},
    "decode-window-softcap": {"queries": 1, "window": (511, 0), "softcap": 30.0},
    "decode-padding": {"queries": 1, "mask": "padding"},
    "decode-loose-padding": {"queries": 1, "mask": "loose-padding"},
    "few-queries": {"queries": 4, "causal": True},
    "few-queries-window": {"queries": 4, "causal": True, "window": (511, 0)},
    "few-queries-softcap": {"queries": 4, "causal": True, "softcap": 30.0},
    "chunk-window": {"queries": 100, "causal": True, "window": (511, 0)},
    "varlen-full": {"varlen": "packed"},
    "varlen-window": {"window": (64, 64), "varlen": "packed"},
    "varlen-causal-softcap": {"causal": True, "softcap": 30.0, "varlen": "packed"},
    "keys": {"varlen": "keys"},
    "keys-causal": {"causal": True, "varlen": "keys"},
    "keys-window": {"window": (64, 64), "varlen": "keys"},
    "keys-causal-softcap": {"causal": True, "softcap": 30.0, "varlen": "keys"},
    "keys-decode": {"queries": 1, "varlen": "keys"},
    "keys-decode-window": {"queries": 1, "window": (64, 0), "varlen": "keys"},
    "keys-decode-softcap": {"queries": 1, "softcap": 30.0, "varlen": "keys"},
    "keys-few-queries": {"queries": 4, "causal": True, "varlen": "keys"},
    "causal-sinks": {"causal": True, "sinks": True},
    "causal-window-sinks": {"causal": True, "window": (127, 0), "sinks": True},
    "decode-sinks": {"queries": 1, "sinks": True},
    "decode-window-sinks": {"queries": 1, "window": (511, 0), "sinks": True},
    "varlen-causal-sinks": {"causal": True, "sinks": True, "varlen": "packed"},
    "keys-chunk": {"queries": 100, "causal": True, "varlen": "keys"},
    # Of the usual size; others are compiled when they are met.
    "pages-causal": {"causal": True, "varlen": "pages", "page_size": 16},
    "pages-decode": {"queries": 1, "varlen": "pages", "page_size": 16},
    "pages-few-queries": {"queries": 4, "causal": True, "varlen": "pages", "page_size": 16},
    "pages-chunk": {"queries": 100, "causal": True, "varlen": "pages", "page_size": 16},
    "pages-tree": {"queries": 4, "mask": "tree", "varlen": "pages", "page_size": 16},
    "packed-pages-causal": {"causal": True, "varlen": "packed_pages", "page_size": 16},
}
SERVING_HEAD_DIMS: tuple[Dims, ...] = (64, 96, 128, 256, (192, 128))  # of language models
# Of models of images, speech and the like, and what they ask for.
OTHER_HEAD_DIMS: tuple[Dims, ...] = (32, 40, 72, 80, 88, 112, 160, 192)
OTHER_VARIANTS = (
    *("full", "causal", "options", "window", "bool-mask", "padding", "loose-padding", "bias"),
    *("decode", "few-queries", "varlen-full", "varlen-causal"),
    *("keys", "keys-causal", "keys-decode"),
)
# Of VARIANTS, what hardly anybody asks for: they show the compiler the most that may come.
_EXTREME_VARIANTS = (
    *("masked", "decode-masked", "loose-bias", "float-bias", "columns-mask", "max-score", "cut"),
    *("pages-masked", "packed-pages", "packed-mixed", "packed-cut", "packed-float8", "tree"),
    *("packed-trees", "packed-trees-cut", "packed-trees-float8"),
    *("packed-drafts", "packed-long", "float8-drafts", "float8-few", "packed-float8-more"),
)
_MASK_VARIANTS = tuple(name for name in VARIANTS if name.endswith(("-mask", "bias", "padding")))
_HOPPER_VARIANTS = (
    *("window", "varlen-causal", "chunk", "uneven", "cut-plain", "packed-float8-more"),
    *(*_MASK_VARIANTS, "packed-pages", "float8-chunk", "float8-drafts", "float8-few"),
    *("packed-decode", "packed-mixed", "packed-few", "packed-cut", "packed-float8", "tree"),
    *("packed-trees", "packed-trees-cut", "packed-trees-float8"),
)
_PORTABLE_VARIANTS = ("long", "packed-drafts", "packed-long")  # the Hopper kernel has others' code
# Of the Hopper kernel's table: from one tile to many an SM.
_SIZES: Sizes = tuple(itertools.product([4**i for i in range(6)], [128 << i for i in range(8)]))
_SEQLEN = 1024  # so many that every window and causal mask hides something
_GROUP = 4  # heads that share one of k and v, where queries are few
_SERVING_GROUPS = (1, _GROUP)  # larger ones have the same kernels


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration is a plan, the variant it was made for, and whether only the table that ships
    has it."""

    variant: str
    plan: Plan
    ships: bool = False


def configurations(
    *,
    archs: Sequence[int] = SUPPORTED_ARCHS,
    head_dims: Sequence[Dims] = HEAD_DIMS,
    dtypes: Sequence[str] = DTYPES,
    variants: Sequence[str] = tuple(VARIANTS),
) -> list[Configuration]:
    """Return every distinct plan of these architectures, head_dims, dtypes and variants.

    Args:
        archs: 90 for sm_90.
        head_dims: of q, k and v.
        dtypes: "float16", "bfloat16" (left out below sm_80, which has none).
        variants: keys of VARIANTS or SERVING_VARIANTS.

    Returns:
        The configurations, ordered by head_dim, dtype, variant and architecture.
    """
    found: dict[Plan, Configuration] = {}
    for head_dim in head_dims:
        for dtype in dtypes:
            for variant in variants:
                options = {**VARIANTS, **SERVING_VARIANTS}[variant]
                if "dims" in options and head_dim != max(HEAD_DIMS):
                    continue
                problem = problem_of(head_dim, dtype, options)
                for arch in archs:
                    if dtype == "bfloat16" and arch < 80:
                        continue
                    portable = variant in VARIANTS and variant not in _HOPPER_VARIANTS
                    for ships in (False,) if variant in _PORTABLE_VARIANTS else (False, True):
                        for plan in _plans(problem, arch, portable, ships):
                            found.setdefault(plan, Configuration(variant, plan, ships))
    return list(found.values())


def serving_plans(
    archs: Sequence[int],
    head_dims: Sequence[Dims] = (*SERVING_HEAD_DIMS, *OTHER_HEAD_DIMS),
    dtypes: Sequence[str] = DTYPES,
    every_variant: bool = False,
) -> list[Plan]:
    """Return the plans of a bundle: what serving a model usually asks for.

    Args:
        archs: 90 for sm_90.
        head_dims: of q, k and v; by default those of common models.
        dtypes: as for `configurations`.
        every_variant: for OTHER_HEAD_DIMS too, and not their shorter list.

    Returns:
        Distinct plans: of VARIANTS but the extreme, and of SERVING_VARIANTS, alone and with heads
        that share keys; of the portable kernel where an architecture has no kernel of its own.
    """
    found: dict[Plan, None] = {}
    for head_dim in head_dims:
        if head_dim in OTHER_HEAD_DIMS and not every_variant:
            variants = list(OTHER_VARIANTS)
        else:
            variants = [v for v in (*VARIANTS, *SERVING_VARIANTS) if v not in _EXTREME_VARIANTS]
        for dtype, variant, arch in itertools.product(dtypes, variants, archs):
            if dtype == "bfloat16" and arch < 80:
                continue
            options = {**VARIANTS, **SERVING_VARIANTS}[variant]
            groups = _SERVING_GROUPS if "queries" in options else (1,)
            usual = variant in ("full", "causal", "options", "varlen")
            portable = forward_for(arch) is PORTABLE or usual
            for group, ships in itertools.product(groups, (False, True)):
                problem = problem_of(head_dim, dtype, options, group)
                for plan in _plans(problem, arch, portable, ships):
                    found[plan.machine_code()] = None
    return list(found)


def _plans(problem: Problem, arch: int, portable: bool, ships: bool) -> Iterator[Plan]:
    """Return what the problem's kind may run on an architecture, by rules or, if it `ships`, by the
    table. The Hopper kernel has other tiles for other sizes, and leaves to the portable one what
    TMA cannot read."""
    if portable and not ships:
        yield candidates(problem, arch, kernel=PORTABLE.name)[0]
    table = tile_table.read(arch) if ships else None
    if problem.seqlen_k > _SEQLEN:
        return
    if forward_for(arch) is not PORTABLE and (table is not None or not ships):
        found: dict[Plan, None] = {}
        for rules in _plans_of_sizes(problem, arch, _SIZES):
            plans = [rules] if table is None else table.tiles_for(problem, rules)
            found |= dict.fromkeys(plan for plan in plans if forward_of(plan) is not PORTABLE)
        yield from (plan.machine_code() for plan in found)


@functools.lru_cache(maxsize=1)  # they are asked for twice in a row, for rules and for the table
def _plans_of_sizes(problem: Problem, arch: int, sizes: Sizes) -> tuple[Plan, ...]:
    return tuple(candidates(_resized(problem, *size), arch)[0] for size in sizes)


def _resized(problem: Problem, batch: int, length: int) -> Problem:
    k_strides, v_strides = (
        (length * dim, length * dim, dim) for dim in (problem.head_dim, problem.head_dim_v)
    )
    seqlen_q, q_strides = length, k_strides
    if problem.seqlen_q < _SEQLEN:  # as many queries and heads as ever
        _, head_stride, row_stride = problem.q_strides
        of_batch = problem.group_size * head_stride
        seqlen_q, q_strides = problem.seqlen_q, (of_batch, head_stride, row_stride)
        if problem.packs_queries:  # which are many rows, though each sequence may have one
            q_strides = (0, problem.head_dim, problem.num_heads_q * problem.head_dim)
    return dataclasses.replace(
        problem,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=length,
        q_strides=q_strides,
        k_strides=k_strides,
        v_strides=v_strides,
        total_q=batch * seqlen_q if problem.packs_queries else 0,
        total_k=batch * length if problem.varlen == "packed" else 0,
    )


def problem_of(head_dim: Dims, dtype: str, options: dict[str, Any], group: int = _GROUP) -> Problem:
    """Return the problem that stands for a variant; `group` heads share keys where queries are
    few."""
    options = dict(options)
    head_dim = options.pop("dims", head_dim)
    keys = options.pop("keys", _SEQLEN)
    dim, dim_v = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    x = torch.empty(1, 1, _SEQLEN, dim, dtype=getattr(torch, dtype))
    k, v = (x.new_empty(1, 1, keys, columns) for columns in (dim, dim_v))
    queries = options.pop("queries", None)
    q = x if queries is None else x.new_empty(1, group, queries, dim)
    mask = options.pop("mask", None)
    if mask not in (None, "tree"):
        is_row = "padding" in mask
        # Rows of a mask for several sequences are aligned for wide loads or not.
        batch, heads, rows = (2, 1, 1) if is_row else (1, *q.shape[1:3])
        width = _SEQLEN + mask.startswith("loose")
        number = torch.float32 if mask.endswith("float-bias") else q.dtype
        element = number if mask.endswith("bias") else torch.bool
        values = torch.empty(batch, heads, rows, width, dtype=element)[..., :_SEQLEN]
        options["mask"] = values.mT.contiguous().mT if mask == "columns" else values
        if is_row:
            q, k, v = (x.expand(2, -1, -1, -1).contiguous() for x in (q, k, v))
    if options.pop("sinks", False):
        options["sinks"] = torch.empty(q.shape[1])
    cache_dtype = options.pop("cache_dtype", "")
    varlen, page_size = options.pop("varlen", "none"), options.pop("page_size", 0)
    if varlen == "none":
        return Problem.from_tensors(q, k, v, **options)
    window = options.pop("window", (-1, -1))
    causal = "lower_right" if options.pop("causal", False) else "none"
    left, right = widest_band(causal, window, q.shape[2], _SEQLEN)
    problem = Problem.from_tensors(q, k, v, **options)
    return dataclasses.replace(
        problem,
        causal=causal,
        window_left=left,
        window_right=right,
        varlen=varlen,
        total_q=q.shape[2] if varlen in PACKS_QUERIES else 0,
        total_k=keys if varlen == "packed" else 0,
        page_size=page_size,
        num_pages=_SEQLEN // page_size if page_size else 0,
        cache_dtype=cache_dtype,
        mask=mask_spec(q.new_empty(2 * q.shape[2:3]), True) if mask == "tree" else problem.mask,
    )
