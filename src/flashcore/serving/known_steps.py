"""Look up what was decided for a step of a decoder, as ops/calls.py does for other calls: under a
key, one guard over all tensors tells whether what was prepared fits them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from flashcore.backends.dispatch import KERNELS, choose_backend, prepare
from flashcore.backends.sinks import as_logits
from flashcore.base import forks
from flashcore.launch.append_call import AppendCall
from flashcore.launch.kernel_call import KernelCall
from flashcore.launch.types import Call
from flashcore.ops.eager import needs_dispatcher
from flashcore.ops.guards import guard
from flashcore.ops.keys import options_key, remember
from flashcore.ops.padded import padded_problem
from flashcore.ops.paged import paged_problem
from flashcore.ops.paged_varlen import packed_pages_problem
from flashcore.problem import Causal, Window
from flashcore.problem.options import Inputs, Options, Wanted
from flashcore.serving.append import prepare_append
from flashcore.serving.arguments import Step
from flashcore.serving.attend import is_readable, pads

KEYS_MAX = 1024
ENTRIES_MAX = 16  # under one key

Result = Tensor | tuple[Tensor, Tensor]


class Known(NamedTuple):
    """Hold what computes steps of one description.

    Args:
        fits: returns whether tensors are described as those are that the entry was made for.
        attend: reads the cache; None where no kernel does so by itself, and the step, which need
            not be checked again, takes the long way (serving/step.py).
        append: writes the new tokens before, if there are any.
        transposes: whether out still has heads before tokens, and the caller wants them behind.
        spans: how many bytes out, q and the caches reach over, where the caller's out lies as the
            kernel writes it; None: it gets a copy.
    """

    fits: Callable[..., bool]
    attend: Call | None
    append: AppendCall | None = None
    transposes: bool = False
    spans: tuple[int, ...] | None = None


class Unknown(NamedTuple):
    """Hold under which key a step is to be kept.

    Args:
        key: of the step.
        fits: as in Known.
        rows_first: whether the caller's tensors have tokens before heads.
        is_checked: whether the step is known to take the long way.
        same_scale: whether one tensor scales keys and values; None: there are no scales.
    """

    key: object
    fits: Callable[..., bool]
    rows_first: bool
    is_checked: bool
    same_scale: bool | None


_known: dict[object, tuple[Known, ...]] = {}
_lock = forks.lock()
# Looked up once, not in every call.
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_data_ptr = Tensor.data_ptr


def attend_known(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cu_seqlens_q: Tensor | None,
    new: tuple[Tensor | None, Tensor | None] | None,
    angles: tuple[Tensor | None, Tensor | None] | None,
    sinks: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None] | None,
    out: Tensor | None,
    options: object,
    rows_first: bool,
) -> Result | Unknown | None:
    """Compute a step that was prepared, of tensors that nobody else needs to see.

    One function, though a long one: on a small call each frame can be felt.

    Args:
        q: as the caller of these takes it, like the tensors that follow.
        k_cache: see q.
        v_cache: see q.
        seqlens_k: int32, [batch].
        page_table: int32, [batch, columns], or None.
        cache_batch_idx: int32, [batch], which is a page table of one column; or None.
        cu_seqlens_q: int32, [batch + 1], or None.
        new: k_new and v_new, or None.
        angles: rotary_cos and rotary_sin, or None.
        sinks: [num_heads_q], or None.
        scales: k_scale and v_scale, or None.
        out: receives the result, if given.
        options: all else that the result depends on; hashable, and with types where 1 == True.
        rows_first: whether tensors have tokens before heads, and out as well.

    Returns:
        out, or (out, lse); Unknown where the caller has to take the long way, which may keep what
        it decides; None where it may not.
    """
    if (
        is_dynamo_compiling()
        or _is_any_autocast_enabled()
        or needs_dispatcher(q, k_cache, v_cache, None)
    ):
        return None
    try:
        # In the order of launch.LENGTHS, with sinks and scales behind.
        given: tuple[Tensor, ...] = q, k_cache, v_cache, seqlens_k
        if cu_seqlens_q is not None:
            given = q, k_cache, v_cache, cu_seqlens_q, seqlens_k
        if page_table is not None:
            given += (page_table,)
        if cache_batch_idx is not None:
            given += (cache_batch_idx,)
        if sinks is not None:
            given += (sinks,)
        same_scale = None
        if scales is not None:
            same_scale = scales[0] is scales[1]  # a guard takes no tensor twice
            given += scales[:1] if same_scale else scales  # type: ignore[operator]
        if new is not None:
            given += new  # type: ignore[operator]
        if angles is not None:
            given += angles  # type: ignore[operator]
        addresses = (*map(_data_ptr, given),)
        guarded, at_out = given, 0
        if out is not None:
            guarded, at_out = (*given, out), out.data_ptr()
        key = (
            q.shape, k_cache.shape, (addresses[0] | addresses[1] | addresses[2]) & 15, options,
            rows_first, page_table is None, cache_batch_idx is None, cu_seqlens_q is None,
            sinks is None, same_scale, new is None, angles is None, out is None, _is_grad_enabled(),
        )  # fmt: skip
        entries = _known.get(key, ())
    except (AttributeError, TypeError, RuntimeError):
        return None  # wrong, or merely unusual
    if 0 in addresses:
        return None
    for found in entries:
        if found[0](*guarded):
            break
    else:
        return Unknown(key, guard(*guarded), rows_first, False, same_scale)
    fits, attend, append, transposes, spans = found
    if attend is None:
        return Unknown(key, fits, rows_first, True, same_scale)
    if out is not None and spans is not None and _is_apart(at_out, addresses, spans):
        into, transposes = out, False
    else:
        into = None
    if append is not None:
        # The memory is kept until the launch: nobody else may get it before.
        _memory, addresses = append.run(addresses)
    elif same_scale:
        addresses += addresses[-1:]
    result, lse = attend(q, k_cache, v_cache, None, addresses, into)
    if transposes:
        result = result.transpose(1, 2).contiguous()
    if out is not into:
        result = out.copy_(result)  # type: ignore[union-attr]
    return result if lse is None else (result, lse)


def _is_apart(at_out: int, addresses: tuple[int, ...], spans: tuple[int, ...]) -> bool:
    """Return whether out may be written while q and the caches are read: it shares no byte with
    them, and is aligned."""
    end = at_out + spans[0]
    for i in (0, 1, 2):
        if at_out < addresses[i] + spans[i + 1] and addresses[i] < end:
            return False
    return at_out & 15 == 0


def _span_bytes(x: Tensor) -> int:
    """Return how many bytes lie between the first and the end of the last element of a tensor."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def keep(unknown: Unknown, step: Step, options: dict[str, Any]) -> None:
    """Keep what computes a step that was checked, and is not known.

    Args:
        unknown: of the step.
        step: the arguments of `attention_with_kvcache`, heads before tokens.
        options: those that it shares with `attention`.
    """
    attend, append, transposes = _prepared(unknown, step, options) or (None, None, False)
    spans = None
    if step.out is not None and step.out.is_contiguous():
        spans = (*map(_span_bytes, (step.out, step.q, step.k_cache, step.v_cache)),)
    known = Known(unknown.fits, attend, append, transposes, spans)
    remember(_known, _lock, unknown.key, known, KEYS_MAX, ENTRIES_MAX)


def _prepared(
    unknown: Unknown, step: Step, options: dict[str, Any]
) -> tuple[Call, AppendCall | None, bool] | None:
    """Return what attends, what appends before, and whether out is to be transposed; None where
    that is not all that a step does."""
    q, k_cache, cu_seqlens_q, rotary = step.q, step.k_cache, step.cu_seqlens_q, step.rotary
    sinks, new, table = options["sinks"], step.k_new is not None, step.page_table
    if step.cache_batch_idx is not None:
        table = step.cache_batch_idx[:, None]
    has_scales = options["k_scale"] is not None
    if (
        not is_readable(k_cache, None)
        or (rotary is not None and not new)
        or (cu_seqlens_q is not None and table is None)
        or has_scales is not (unknown.same_scale is not None)  # made for this call alone
        or (sinks is not None and as_logits(sinks).data_ptr() != sinks.data_ptr())
    ):
        return None
    longest: Any = 0
    if cu_seqlens_q is not None:
        longest = q.shape[0] if step.max_seqlen_q is None else step.max_seqlen_q
        if pads(step, cu_seqlens_q.shape[0] - 1, longest, options):
            return None
    inputs = Inputs(
        q.new_empty(q.shape) if rotary is not None else q, k_cache, step.v_cache,
        seqlens_k=step.seqlens_k, cu_seqlens_q=cu_seqlens_q, page_table=table,
        sinks=sinks, k_scale=options["k_scale"], v_scale=options["v_scale"], max_seqlen_q=longest,
    )  # fmt: skip
    kernel = _kernel(inputs, step.return_lse, step.backend, options)
    if kernel is None:
        return None
    attends = _attends(inputs)
    append = None
    if step.k_new is not None and step.v_new is not None:
        append = prepare_append(
            q, (step.k_new, step.v_new), rotary,
            {
                "k_cache": k_cache, "v_cache": step.v_cache, "seqlens_k": step.seqlens_k,
                "page_table": table, "cu_seqlens_q": cu_seqlens_q,
                "cu_seqlens_new": cu_seqlens_q, "k_scale": inputs.k_scale,
                "v_scale": inputs.v_scale,
            },
            step.backend, attends,
        )  # fmt: skip
        if append is None:
            return None
    if not unknown.rows_first or cu_seqlens_q is not None:
        return kernel.run, append, False
    direct = kernel.with_rows_first()
    return (kernel if direct is None else direct).run, append, direct is None


def _kernel(
    inputs: Inputs, return_lse: bool, backend: str, options: dict[str, Any]
) -> KernelCall | None:
    """Return the call of the kernel that attends, if one does that reads the tensors in place."""
    asked = Options.checked(
        options["causal"], options["window"], options["softcap"], options["scale"],
        options["batch_invariant"],
    )  # fmt: skip
    describe = padded_problem
    if inputs.page_table is not None:
        describe = paged_problem if inputs.cu_seqlens_q is None else packed_pages_problem
    wanted = Wanted(return_lse, False).checked()
    problem = dataclasses.replace(describe(inputs, asked), **wanted._asdict())
    choice = choose_backend(problem, backend)
    if choice.backend not in KERNELS or problem.is_empty:
        return None
    kernel = getattr(prepare(choice.backend, problem, inputs.q.device), "__self__", None)
    return kernel if isinstance(kernel, KernelCall) else None


def _attends(inputs: Inputs) -> list[str]:
    """Return the tensors that attention reads, in the order of KernelCall's addresses."""
    optional = "cu_seqlens_q", "page_table", "sinks", "k_scale", "v_scale"
    missing = {name for name in optional if getattr(inputs, name) is None}
    names = "q", "k_cache", "v_cache", "cu_seqlens_q", "seqlens_k", *optional[1:]
    return [name for name in names if name not in missing]


def asked_for(
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
) -> object:
    """Return the part of a key that says what `attention` was asked for, where that is not causal
    alone; a list, which is no key, where something is wrong."""
    try:
        return options_key(causal, window, softcap, scale, return_lse, False, None)
    except TypeError:
        return []
