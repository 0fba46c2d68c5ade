"""Compute one step of a decoder from its arguments: check them, append, attend."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from flashcore.backends.autocasting import autocast_dtype, cast_like
from flashcore.backends.dispatch import without_autocast
from flashcore.backends.packed import checked_max_seqlen
from flashcore.ops.transforms.autograd import needs_grad
from flashcore.plain.trees import tree_over_keys
from flashcore.problem.options import Options
from flashcore.problem.validation import check_flag, check_sinks
from flashcore.serving import checking, known_steps, remembered
from flashcore.serving.append import append, rotated_queries
from flashcore.serving.arguments import Step
from flashcore.serving.attend import attend_pages
from flashcore.serving.checking_rotary import check_rotary
from flashcore.serving.known_steps import Unknown
from flashcore.serving.pages import capacity_of
from flashcore.serving.rows import lengths_before, lengths_of_keys

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # looked up once, not in every call


def with_kvcache(
    step: Step, options: dict[str, Any], unknown: Unknown | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `attention_with_kvcache`, see there, by the long way.

    Args:
        step: the arguments.
        options: those that it shares with `attention` and `attention_varlen`.
        unknown: of a step for which what is decided is to be kept.

    Returns:
        out, or (out, lse).
    """
    q, k_cache, k_new, v_new = step.q, step.k_cache, step.k_new, step.v_new
    autocasts = is_dynamo_compiling() or _is_any_autocast_enabled()
    if autocasts and autocast_dtype(q.device.type if isinstance(q, Tensor) else "cpu") is not None:
        # The cache keeps its dtype; the rest is cast to it.
        q, k_new, v_new = (cast_like(x, k_cache) for x in (q, k_new, v_new))  # type: ignore[assignment]
        step = step._replace(q=q, k_new=k_new, v_new=v_new)
    if unknown is None:
        _check_once(step, options)
    elif not unknown.is_checked:
        check_step(step, options)
        known_steps.keep(unknown, step, options)
    with without_autocast(step.q.device.type) if autocasts else contextlib.nullcontext():
        results = attend_pages(appended(step, options), options)
    return _handed_out(results, step.return_lse, step.out, step.lse)


def appended(step: Step, options: dict[str, Any]) -> Step:
    """Append the new tokens of a step that was checked, and rotate; return what is left to do,
    which is to attend to the cache: with the queries, lengths, page table and masks for that."""
    (
        q, k_cache, v_cache, k_new, v_new, seqlens_k, page_table, cache_batch_idx, cache_leftpad,
        cu_seqlens_q, cu_seqlens_new, _, rotary, mask, tree_mask, _, _, _, backend,
    ) = step  # fmt: skip
    capacity = capacity_of(k_cache, page_table)
    if cache_batch_idx is not None:
        page_table = cache_batch_idx[:, None]
    if k_new is not None and v_new is not None:
        q, seqlens_k = append(
            k_cache, v_cache, q, k_new, v_new, seqlens_k, page_table, cu_seqlens_q,
            cu_seqlens_q if cu_seqlens_new is None else cu_seqlens_new, rotary, backend,
            options["k_scale"], options["v_scale"],
        )  # fmt: skip
    elif rotary is not None:
        before = lengths_before(seqlens_k, capacity)
        q = rotated_queries(q, before, cu_seqlens_q, rotary, 0)
    if tree_mask is not None and mask is not None:  # kernels read one of them
        lengths = lengths_of_keys(seqlens_k, capacity, cache_leftpad)
        mask, tree_mask = tree_over_keys(tree_mask, mask, q, lengths, capacity), None
    return step._replace(
        q=q, k_new=None, v_new=None, rotary=None, seqlens_k=seqlens_k, page_table=page_table,
        mask=mask, tree_mask=tree_mask,
    )  # fmt: skip


def _check_once(step: Step, options: dict[str, Any]) -> None:
    """Check the arguments by `check_step`, unless such arguments were."""
    rotary, invariant = step.rotary, options["batch_invariant"]
    tensors = (
        *step[:11], step.mask, step.tree_mask, step.out, step.lse, options["sinks"],
        options["k_scale"], options["v_scale"],
        *(() if rotary is None else (rotary.cos, rotary.sin, rotary.offsets, rotary.positions)),
    )  # fmt: skip
    pairs = None if rotary is None else (rotary.interleaved, rotary.queries)
    bound = step.max_seqlen_q
    asked = bound, type(bound), step.backend, pairs, step.lse is None, invariant is True
    if invariant is not True and invariant is not False:
        check_flag("batch_invariant", invariant)
    key = remembered.key_of(tensors, asked, options, step.return_lse)
    if not remembered.is_known(key, tensors):
        check_step(step, options)
        remembered.keep(key, tensors)


def check_step(step: Step, options: dict[str, Any]) -> None:
    """Raise unless the arguments of `with_kvcache` fit, before anything is written."""
    (
        q, k_cache, v_cache, k_new, v_new, seqlens_k, page_table, cache_batch_idx, cache_leftpad,
        cu_seqlens_q, cu_seqlens_new, max_seqlen_q, rotary, mask, tree_mask, return_lse, out, lse,
        backend,
    ) = step  # fmt: skip
    check_flag("return_lse", return_lse)
    is_packed = cu_seqlens_q is not None
    checking.check_caches(q, k_cache, v_cache, is_packed, page_table is not None)
    batch = checking.batch_of(q, cu_seqlens_q, cu_seqlens_new)
    checking.check_caches_scales(k_cache, v_cache, options, batch)
    checking.check_table(q, k_cache, seqlens_k, page_table, cache_batch_idx, cache_leftpad, batch)
    checking.check_new(q, k_cache, v_cache, k_new, v_new, batch)
    if rotary is not None:
        check_rotary(rotary, q, k_new, batch)
    checking.check_given(out, lse, q, v_cache)
    if options["sinks"] is not None and not is_compiling():
        check_sinks(options["sinks"], q, q.shape[1])
    capacity = capacity_of(k_cache, page_table)
    checking.check_capacity(capacity)
    checking.check_masks(q, mask, tree_mask, is_packed, batch, capacity)
    checking.check_backend_serves(q, k_cache, v_cache, backend, batch, capacity)
    scalars = "causal", "window", "softcap", "scale", "batch_invariant"
    Options.checked(**{name: options[name] for name in scalars})
    if is_packed and max_seqlen_q is not None:
        checked_max_seqlen("max_seqlen_q", max_seqlen_q, q.shape[0])
    if needs_grad(q, k_cache, v_cache, k_new, v_new, options["sinks"]):
        raise NotImplementedError(
            "q, a cache, a new token or sinks require a gradient, but attention_with_kvcache has "
            "no backward pass; call it under torch.no_grad(), or attention or attention_varlen"
        )


def _handed_out(
    results: tuple[Tensor, ...], return_lse: bool, out: Tensor | None, lse: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return what the caller asked for, in the memory that was given."""
    returned = [
        result if given is None else given.copy_(result)
        for given, result in zip((out, lse), results, strict=False)
    ]
    return (returned[0], returned[1]) if return_lse else returned[0]
