"""Attend to a cache whose tokens are all there: choose the function that reads it as it lies."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flashcore.api import attention
from flashcore.backends.packed import of_packed
from flashcore.errors import FallbackWarning, stacklevel_of_caller
from flashcore.ops.padded import attention_padded
from flashcore.ops.paged import attention_paged
from flashcore.ops.paged_varlen import attention_paged_varlen
from flashcore.ops.varlen import attention_varlen
from flashcore.plain.trees import tree_of_padded
from flashcore.problem.options import Inputs
from flashcore.serving.arguments import Step
from flashcore.serving.pages import capacity_of, gather_packed, gather_padded, one_page_each
from flashcore.serving.rows import Rows, lengths_of_keys, number_of

# PyTorch is given padded queries where that makes at most so many rows of each: it computes packed
# sequences one after the other. Kernels share keys and row tiles of packed queries, and padding
# takes 35 to 50 us of an H200 (docs/ladder.md).
PADDED_ROWS_MAX = 2

COPY_TEXT = (
    "flashcore.attention_with_kvcache copies the cache's tokens into one piece: with "
    "cache_leftpad no kernel reads it in place; filter flashcore.FallbackWarning to silence this"
)

_warned: set[str] = set()


def attend_pages(step: Step, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Attend to the first seqlens_k tokens of each sequence of a cache.

    A contiguous cache is read in place by `attention`, pages by `attention_paged`, or by
    `attention_paged_varlen` for packed queries. With padding on the left, which none of them takes,
    tokens are copied into one piece. The others clamp lengths themselves: that takes no launch.

    Args:
        step: what is left to do of a step, see `step.appended`.
        options: those that it shares with `attention` and `attention_varlen`.

    Returns:
        out, and lse if it is asked for or has memory.
    """
    return_lse = step.return_lse or step.lse is not None
    options = {**options, "return_lse": return_lse, "backend": step.backend}
    road, inputs, is_copied, longest = read_cache(step, options)
    if is_copied:
        _warn_of_copy(step.q, step.backend)
    if road == "contiguous":
        return _contiguous(inputs, options)
    if road == "packed":
        for name in ("k_scale", "v_scale"):
            del options[name]
        return _several(attention_varlen(*of_packed(inputs), **options))
    pages: Any = inputs.q, inputs.k, inputs.v, inputs.page_table, inputs.seqlens_k
    options["tree_mask"] = inputs.tree_mask
    if road == "packed pages":
        packed: Any = *pages, inputs.cu_seqlens_q, inputs.max_seqlen_q
        return _several(attention_paged_varlen(*packed, **options))
    results = _several(attention_paged(*pages, mask=inputs.mask, **options))
    if longest is None:
        return results
    assert step.cu_seqlens_q is not None
    return _packed(results, step.q, step.cu_seqlens_q, longest, options["sinks"])


class Reading(NamedTuple):
    """A Reading says which function attends to a cache, and to what.

    Args:
        road: "contiguous", `attention` with seqlens_k; "pages", `attention_paged`; "packed pages",
            `attention_paged_varlen`; or "packed", `attention_varlen`.
        inputs: what it is given.
        is_copied: whether the cache's tokens were copied into one piece.
        longest: what packed queries were padded to; None if they were not.
    """

    road: str
    inputs: Inputs
    is_copied: bool = False
    longest: int | None = None


def read_cache(step: Step, options: dict[str, Any], on_gpu: bool | None = None) -> Reading:
    """Decide how a cache is read, and make what is read.

    Args:
        step: as `attend_pages` takes it.
        options: of `attention`.
        on_gpu: whether a GPU computes; None: if q is there.
    """
    q, k_cache, v_cache, page_table = step.q, step.k_cache, step.v_cache, step.page_table
    seqlens_k, leftpad, cu_seqlens_q = step.seqlens_k, step.cache_leftpad, step.cu_seqlens_q
    tree_mask = step.tree_mask
    others: dict[str, Any] = {name: options[name] for name in ("sinks", "k_scale", "v_scale")}
    masks: dict[str, Any] = {"mask": step.mask, "tree_mask": tree_mask}
    if page_table is None and leftpad is None and cu_seqlens_q is None:
        inputs = Inputs(q, k_cache, v_cache, seqlens_k=seqlens_k, **masks, **others)
        return Reading("contiguous", inputs)
    if page_table is None:
        page_table = one_page_each(k_cache)
    capacity = capacity_of(k_cache, page_table)
    pages = Inputs(q, k_cache, v_cache, seqlens_k=seqlens_k, page_table=page_table, **others)
    readable = is_readable(k_cache, leftpad)
    if cu_seqlens_q is None:
        if readable:
            return Reading("pages", pages._replace(**masks))
        k, v = (gather_padded(x, page_table, leftpad) for x in (k_cache, v_cache))
        lengths = lengths_of_keys(seqlens_k, capacity, leftpad)
        return Reading("contiguous", Inputs(q, k, v, seqlens_k=lengths, **masks, **others), True)
    batch = page_table.shape[0]
    longest = q.shape[0] if step.max_seqlen_q is None else step.max_seqlen_q
    if readable and isinstance(longest, int) and pads(step, batch, longest, options, on_gpu):
        padded = pages._replace(q=_padded(q, cu_seqlens_q, longest))
        if tree_mask is not None:
            number: Any = number_of(q, cu_seqlens_q)
            padded = padded._replace(tree_mask=tree_of_padded(tree_mask, number, longest))
        return Reading("pages", padded, longest=longest)
    bounded: Any = longest
    packed = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": bounded, "tree_mask": tree_mask}
    if readable:
        return Reading("packed pages", pages._replace(**packed))
    if tree_mask is not None and batch * capacity > 0:  # attention_varlen takes no tree
        k, v = (gather_padded(x, page_table, leftpad) for x in (k_cache, v_cache))
        lengths, table = lengths_of_keys(seqlens_k, capacity, leftpad), one_page_each(k)
        inputs = Inputs(q, k, v, seqlens_k=lengths, page_table=table, **others)
        return Reading("packed pages", inputs._replace(**packed), True)
    scales = options["k_scale"], options["v_scale"]
    lengths = lengths_of_keys(seqlens_k, capacity, leftpad)
    k, v, cu_seqlens_k = gather_packed(
        (k_cache, v_cache), page_table, leftpad, lengths, q.dtype, scales
    )
    inputs = Inputs(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=bounded,
        max_seqlen_k=capacity, sinks=options["sinks"],
    )  # fmt: skip
    return Reading("packed", inputs, True)


def is_readable(k_cache: Tensor, leftpad: Tensor | None) -> bool:
    """Return whether kernels may read a cache in place: it holds tokens, and all that it has
    count."""
    return leftpad is None and k_cache.shape[0] > 0 and k_cache.shape[2] > 0


def pads(
    step: Step, batch: int, longest: int, options: dict[str, Any], on_gpu: bool | None = None
) -> bool:
    """Return whether packed queries are padded.

    Args:
        step: has the queries and the backend.
        batch: sequences.
        longest: a bound on the queries of each.
        options: of `attention`.
        on_gpu: whether a GPU computes; None: if q is there.
    """
    q = step.q
    if (
        options["causal"] == "upper_left"
        or options["batch_invariant"]  # whether it pays depends on who else is there
        or not 0 < batch * longest <= PADDED_ROWS_MAX * q.shape[0]
    ):
        return False
    return not (q.is_cuda if on_gpu is None else on_gpu) or step.backend == "torch"


def _contiguous(inputs: Inputs, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Attend to the first keys of each row of a cache; `attention` takes no tree."""
    if inputs.tree_mask is None:
        q, k, v, mask, lengths, *_ = inputs
        return _several(attention(q, k, v, seqlens_k=lengths, mask=mask, **options))
    others = "sinks", "k_scale", "v_scale"
    asked = {name: x for name, x in options.items() if name not in others}
    return _several(attention_padded(inputs, return_max_score=False, **asked))


def _several(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _padded(q: Tensor, cu_seqlens_q: Tensor, longest: int) -> Tensor:
    """Return packed queries as [batch, num_heads_q, longest, head_dim], each sequence's at the end,
    where masks are aligned; before them stand any others."""
    ends = cu_seqlens_q[1:].long().clamp(0, q.shape[0])
    row = ends[:, None] - longest + torch.arange(longest, device=q.device)
    return q[row.clamp(0, q.shape[0] - 1)].transpose(1, 2)


def _packed(
    results: tuple[Tensor, ...],
    q: Tensor,
    cu_seqlens_q: Tensor,
    longest: int,
    sinks: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return results of padded queries as those of packed ones; in rows of no sequence 0 and -inf,
    or the sinks."""
    rows = Rows.of(q, cu_seqlens_q)
    number = number_of(q, cu_seqlens_q)
    assert isinstance(number, Tensor)
    assert rows.is_any is not None
    place = (rows.token + longest - number[rows.sequence]).clamp(0, longest - 1)
    out = results[0].transpose(1, 2)[rows.sequence, place]
    packed = [out.masked_fill(~rows.is_any[:, None, None], 0.0)]
    for lse in results[1:]:
        by_row = lse.transpose(1, 2)[rows.sequence, place]
        unseen = lse.new_full((), -math.inf) if sinks is None else sinks.to(lse.dtype)
        packed.append(torch.where(rows.is_any[:, None], by_row, unseen).t().contiguous())
    return tuple(packed)


def _warn_of_copy(q: Tensor, backend: str) -> None:
    """Say once that no kernel reads a cache in place with cache_leftpad."""
    if not warns_of_copy(q.is_cuda, backend) or is_compiling() or "cache_leftpad" in _warned:
        return
    _warned.add("cache_leftpad")
    warnings.warn(COPY_TEXT, FallbackWarning, stacklevel=stacklevel_of_caller())


def warns_of_copy(on_gpu: bool, backend: str) -> bool:
    """Return whether a call whose cache is copied says so: where a kernel might have read it."""
    return on_gpu and backend != "torch"
