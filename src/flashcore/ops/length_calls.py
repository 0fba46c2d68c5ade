"""Look up what was decided for sequences that differ in length, or for a call with sinks, as
ops/calls.py does for other calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import KERNELS, choose_backend, prepare
from flashcore.backends.sinks import as_logits
from flashcore.ops import calls
from flashcore.ops.calls import Found, Result, asked_for, keep
from flashcore.ops.guards import guard
from flashcore.ops.keys import options_key
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.options import Options, Wanted

# Records a call; takes a State, q, k, v, the mask or None, the lengths, and the longest.
RecordLengths = Callable[..., Any]
# Looked up once, not in every call.
_is_grad_enabled = torch.is_grad_enabled
_data_ptr = Tensor.data_ptr


def attend_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: tuple[Tensor, ...],
    sinks: Tensor | None,
    options: tuple[Causal, Window, float | None, float | None, bool, bool],
    longest: tuple[int, int] | None,
    backend: str,
    describe: Callable[[], Problem],
    batch_invariant: bool = False,
    scales: tuple[Tensor, ...] = (),
    record: RecordLengths | None = None,
    is_tree: bool = False,
    deterministic: bool = True,
) -> Result | None:
    """Compute sequences that differ in length, or have sinks, by a kernel, if one serves them,
    around torch's dispatcher.

    Args:
        q: as the caller of these takes it, like k and v.
        k: see q.
        v: see q.
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        lengths: int32 tensors, in the order of launch.LENGTHS; none where they do not differ.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.
        options: causal, window, softcap, scale, return_lse and return_max_score, as in
            `attention`.
        longest: the longest sequences of queries and of keys, where sequences are packed.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        describe: validates the other arguments and returns their Problem.
        batch_invariant: as in `attention`.
        scales: of k and v where they have 8 bits.
        record: what records the call if autograd is to, of q, k and v alone; None: nothing is
            recorded.
        is_tree: whether `mask` is a tree_mask.
        deterministic: as in `attention`.

    Returns:
        What `attend` returns; None where the operator has to do it.

    Raises:
        Exception: what `describe` and `choose_backend` raise.
    """
    try:
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        addresses = at_q, at_k, at_v, *map(_data_ptr, lengths)
        # Queries and keys may have the same lengths; a guard takes no tensor twice.
        guarded = lengths[:1] if len(lengths) == 2 and lengths[0] is lengths[1] else lengths
        unusual = None  # what few calls have
        flags = batch_invariant, deterministic
        is_flagged = batch_invariant is not False or deterministic is not True
        if sinks is not None or scales or is_tree or is_flagged:
            of_sinks = None
            if sinks is not None:
                of_sinks, sinks = sinks.dtype, as_logits(sinks)
                addresses += (sinks.data_ptr(),)
                guarded = (*guarded, sinks)
            if scales:
                addresses += (*map(_data_ptr, scales),)
                guarded += scales[:1] if scales[0] is scales[1] else scales
            unusual = len(scales), of_sinks, flags, (*map(type, flags),), is_tree
        causal, window, softcap, scale, return_lse, return_max_score = options
        recorded = (
            record is not None
            and _is_grad_enabled()
            and (q.requires_grad or k.requires_grad or v.requires_grad)
        )
        key = (
            q.shape, k.shape, recorded, (at_q | at_k | at_v) & 15,
            causal if (
                (causal is False or causal is True) and return_lse is False and mask is None
                and window is None and scale is None and softcap is None
                and return_max_score is False
            ) else options_key(*options, mask),
            len(guarded), longest, backend, unusual,
        )  # fmt: skip
        known = calls._calls.get(key, ())
    except (AttributeError, TypeError, RuntimeError):
        return None  # wrong, or merely unusual
    if 0 in addresses:
        return None
    for found in known:
        if found[0](q, k, v, *guarded):
            break
    else:
        wanted = Wanted(return_lse, return_max_score).checked()
        problem = dataclasses.replace(describe(), **wanted._asdict())
        if recorded:
            problem = dataclasses.replace(problem, return_lse=True)
        choice = choose_backend(problem, backend)
        if choice.backend not in KERNELS or problem.is_empty:
            return None
        fits, call = guard(q, k, v, *guarded), prepare(choice.backend, problem, q.device)
        asked = Options.checked(causal, window, softcap, scale, *flags)
        found = Found(fits, call, asked, {}, backend)
        keep(key, found)
    if recorded:
        assert record is not None
        state = found, return_lse, addresses
        result: Result = record(state, q, k, v, mask, lengths, longest)
        return result
    computed = found[1](q, k, v, mask, addresses)
    if computed[1] is None and len(computed) == 2:  # the common case, without another frame
        return computed[0]
    return asked_for(computed)
