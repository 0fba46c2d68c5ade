"""Look up what was decided for a description of tensors, instead of deciding it again.

The shapes, alignment, options and the options' types make a key. Under a key there are entries
(`Found`), one for each combination of strides, dtypes and devices that such calls came with. An
entry holds a function that only allocates and launches. A call of `attention` depends on nothing
else but addresses and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.backends.dispatch import (
    BACKENDS,
    adapt_for,
    choose_backend,
    prepare,
    warn_once,
)
from flashcore.backends.growing import Growing
from flashcore.base import forks
from flashcore.base.bounded import make_room
from flashcore.launch import launcher
from flashcore.launch.types import Addresses, Call, Computed, Prepared
from flashcore.ops.guards import guard
from flashcore.ops.keys import family_key, options_key, remember
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.options import Options
from flashcore.problem.ranks import as_rank_4, has_other_rank

Result = Tensor | tuple[Tensor, ...]
# A Record computes a call so that autograd can differentiate it; it takes a State, q, k, v and
# perhaps a mask.
Record = Callable[..., Any]
# Decides what computes a call; takes the arguments of `find`.
Decide = Callable[..., "Found | None"]
# By key, what fits tensors, and what computes their gradients (None where the operator does). See
# gradient_calls.py.
Passes = dict[object, tuple[tuple[Callable[..., bool], Prepared | None], ...]]


class Found(NamedTuple):
    """Hold what computes calls of one description.

    Args:
        fits: returns whether q, k and v have the strides, dtypes and devices of those that the
            entry was made for, and v its shape.
        call: computes; see launch/types.py.
        options: the validated options.
        passes: the backward passes that were prepared for the call.
        backend: the backend that the caller asked for, which the backward pass takes too.
    """

    fits: Callable[..., bool]
    call: Call
    options: Options
    passes: Passes
    backend: str = "auto"


CALLS_MAX = 1024  # keys that are remembered
FOUND_MAX = 16  # entries under one key

_calls: dict[object, tuple[Found, ...]] = {}
_growing: dict[object, Growing] = {}
_lock = forks.lock()
State = tuple[Found, bool, Addresses]  # the bool: return_lse
_is_grad_enabled = torch.is_grad_enabled  # looked up once, not in every call


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
    record: Record | None = None,
    decide: Decide | None = None,
    return_max_score: bool = False,
    deterministic: bool = True,
) -> Result:
    """Compute `attention` of tensors that nobody else needs to see.

    One function, though a long one: on a small call each frame can be felt.

    Args:
        q: as in `attention`, like all the arguments that follow.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        causal: False, True (aligned at the lower right) or "upper_left".
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        return_lse: whether the log-sum-exp of each row of scores is returned too.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        record: what records the call if autograd is to; None: nothing is recorded.
        decide: by default `find`. A drop-in function's own takes the tensors as they were given
            there; what it found is remembered for it alone.
        return_max_score: whether the largest score of each head is returned too; not with `decide`.
        deterministic: whether gradients have the same bits in every run; True with `decide`.

    Returns:
        out, or (out, lse) with return_lse, and max_score behind them with return_max_score; None
        where `decide` found nothing.

    Raises:
        Exception: what `attention` raises.
    """
    key, found, recorded = None, None, False
    try:
        recorded = (
            record is not None
            and _is_grad_enabled()
            and (
                q.requires_grad
                or k.requires_grad
                or v.requires_grad
                or (mask is not None and mask.requires_grad)
            )
        )
        addresses = at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        # A tensor without memory is empty, or a stand-in for a tensor (fake, meta, functional).
        if at_q and at_k and at_v:
            # `is`, not `==`: 1 == True == 1.0, but 1 and 1.0 are not valid here.
            if (
                (causal is False or causal is True)
                and return_lse is False
                and return_max_score is False
                and mask is None
                and window is None
                and scale is None
                and softcap is None
            ):
                options: object = causal
            else:
                options = options_key(
                    causal, window, softcap, scale, return_lse, return_max_score, mask
                )
            if deterministic is not True:
                options = options, deterministic, type(deterministic)
            alignment = (at_q | at_k | at_v) & 15
            key = q.shape, k.shape, alignment, options, recorded, backend, decide
            for found in _calls.get(key, ()):
                if found[0](q, k, v):
                    break
            else:
                found = None
    except (AttributeError, TypeError, RuntimeError):
        key = None  # an argument is wrong or not hashable; validation below finds out which
    if found is None:
        if decide is None and record is not None and has_other_rank(q, k, v):
            given = as_rank_4(q, k, v, mask)
            q, k, v, mask, _, _ = given
            return given.restored(
                attend(
                    q, k, v, mask, causal, window, softcap, scale, return_lse, backend, record,
                    None, return_max_score, deterministic,
                )
            )  # fmt: skip
        asked = q, k, v, mask, causal, window, softcap, scale, return_lse, backend, recorded, key
        if decide is None:
            found = find(*asked, return_max_score, deterministic)
        else:
            found = decide(*asked)
        if found is None:
            return None  # type: ignore[return-value]
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if recorded:
        assert record is not None
        state = found, return_lse, addresses
        result: Result = record(state, q, k, v) if mask is None else record(state, q, k, v, mask)
        return result
    computed = found[1](q, k, v, mask, addresses)
    if computed[1] is None and not return_max_score:  # the common case, without another frame
        return computed[0]
    return asked_for(computed)


def find(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    backend: str,
    recorded: bool = False,
    key: object = None,
    return_max_score: bool = False,
    deterministic: bool = True,
) -> Found:
    """Decide what computes a call of `attend`, and keep it under the key, unless that is None. If
    the call is recorded, it computes lse in any case."""
    family = (
        None
        if return_max_score is not False or deterministic is not True
        else family_key(
            q, k, v, mask, causal, window, softcap, scale, return_lse, backend, recorded
        )
    )
    growing = _growing.get(family)
    if growing is not None:
        member = growing.of_length(q, k, v, mask)
        if member is not None:
            found = Found(guard(q, k, v), member.run, growing.options, {}, backend)
            keep(key, found)
            return found
    problem = Problem.from_tensors(
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        mask=mask,
        # A value that is no bool stays as it is, for the error.
        return_lse=True if recorded and return_lse is False else return_lse,
        return_max_score=return_max_score,
        deterministic=deterministic,
    )
    choice = choose_backend(problem, backend)
    if choice.is_fallback:
        warn_once(choice)
    call = prepare(choice.backend, problem, q.device)
    found = Found(guard(q, k, v), call, Options.of(problem), {}, backend)
    if choice.backend == "sim":  # depends on environment variables
        return found
    keep(key, found)
    kernel = getattr(call, "__self__", None)
    if (
        family is not None
        and kernel is not None
        and Growing.serves(problem)
        and adapt_for(choice.backend, problem).problem == problem
    ):
        fits = guard(q, k, v, any_keys=True)
        with _lock:
            make_room(_growing, CALLS_MAX)
            _growing[family] = Growing(problem, kernel, fits, found.options)
    return found


def asked_for(computed: Computed) -> Result:
    """Return what a call computed as the caller gets it."""
    if computed[1] is None:  # lse
        return computed[0] if len(computed) == 2 else (computed[0], computed[2])
    return computed


def keep(key: object, found: Found) -> None:
    """Remember what computes the calls of a key, unless that is None."""
    if key is not None:
        remember(_calls, _lock, key, found, CALLS_MAX, FOUND_MAX)


launcher.lookup = launcher.Lookup(find, BACKENDS, CALLS_MAX)
