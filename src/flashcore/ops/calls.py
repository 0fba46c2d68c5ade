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
    KERNELS,
    Addresses,
    Call,
    adapt_for,
    choose_backend,
    prepare,
    warn_once,
)
from flashcore.backends.growing import Growing
from flashcore.base import forks
from flashcore.ops.guards import guard
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.options import Options
from flashcore.problem.ranks import as_rank_4, has_other_rank

Result = Tensor | tuple[Tensor, Tensor]
# A Record computes a call so that autograd can differentiate it; it takes a State, q, k, v and
# perhaps a mask.
Record = Callable[..., Any]


class Found(NamedTuple):
    """Hold what computes calls of one description.

    Args:
        fits: returns whether q, k and v have the strides, dtypes and devices of those that the
            entry was made for, and v its shape.
        call: computes; see dispatch.Call.
        options: the validated options.
        backend: the backend that the caller asked for, which the backward pass takes too.
    """

    fits: Callable[[Tensor, Tensor, Tensor], bool]
    call: Call
    options: Options
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

    Returns:
        out, or (out, lse) with return_lse.

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
                and mask is None
                and window is None
                and scale is None
                and softcap is None
            ):
                options: object = causal
            else:
                options = _options_key(causal, window, softcap, scale, return_lse, mask)
            key = q.shape, k.shape, (at_q | at_k | at_v) & 15, options, recorded, backend
            for found in _calls.get(key, ()):
                if found[0](q, k, v):
                    break
            else:
                found = None
    except (AttributeError, TypeError, RuntimeError):
        key = None  # an argument is wrong or not hashable; validation below finds out which
    if found is None:
        if record is not None and has_other_rank(q, k, v):
            given = as_rank_4(q, k, v, mask)
            q, k, v, mask, _, _ = given
            return given.restored(
                attend(q, k, v, mask, causal, window, softcap, scale, return_lse, backend, record)
            )
        found = find(
            q, k, v, mask, causal, window, softcap, scale, return_lse, backend, recorded, key
        )
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if recorded:
        assert record is not None
        state = found, return_lse, addresses
        result: Result = record(state, q, k, v) if mask is None else record(state, q, k, v, mask)
        return result
    out, lse = found[1](q, k, v, mask, addresses)
    return out if lse is None else (out, lse)


def _options_key(
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    mask: Tensor | None,
) -> tuple[object, ...]:
    """Return a key of the options; types are in it because 1 == True == 1.0, and not all of them
    are valid."""
    return (
        causal, type(causal), scale, type(scale), softcap, type(softcap),
        window if window is None else (type(window), *window, *map(type, window)),
        return_lse, type(return_lse), None if mask is None else _mask_key(mask),
    )  # fmt: skip


def _mask_key(mask: Tensor) -> tuple[object, ...]:
    address = mask.data_ptr()
    if not address:
        raise RuntimeError("a mask without memory")
    return mask.shape, mask.stride(), address & 15, mask.dtype, mask.device, mask.is_neg()


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
) -> Found:
    """Decide what computes a call of `attend`, and keep it under the key, unless that is None. If
    the call is recorded, it computes lse in any case."""
    family = _family_key(
        q, k, v, mask, causal, window, softcap, scale, return_lse, backend, recorded
    )
    growing = _growing.get(family)
    if growing is not None:
        member = growing.of_length(q, k, v, mask)
        if member is not None:
            found = Found(guard(q, k, v), member.run, growing.options)
            _keep(key, found)
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
        # What is no bool stays what it is, for the error.
        return_lse=True if recorded and return_lse is False else return_lse,
    )
    choice = choose_backend(problem, backend)
    if choice.is_fallback:
        warn_once(choice)
    call = prepare(choice.backend, problem, q.device)
    found = Found(guard(q, k, v), call, Options.of(problem), backend)
    if choice.backend == "sim":  # depends on environment variables
        return found
    _keep(key, found)
    kernel = getattr(call, "__self__", None)
    if (
        family is not None
        and kernel is not None
        and Growing.serves(problem)
        and adapt_for(choice.backend, problem).problem == problem
    ):
        fits = guard(q, k, v, any_keys=True)
        with _lock:
            if len(_growing) >= CALLS_MAX:
                del _growing[next(iter(_growing))]
            _growing[family] = Growing(problem, kernel, fits, found.options)
    return found


def attend_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: tuple[Tensor, ...],
    options: tuple[Causal, Window, float | None, float | None, bool],
    longest: tuple[int, int] | None,
    backend: str,
    describe: Callable[[], Problem],
) -> tuple[Tensor, Tensor] | None:
    """Compute sequences that differ in length by a kernel, if one serves them, around torch's
    dispatcher; nothing is recorded.

    Args:
        q: as the caller of these takes it, like k and v.
        k: see q.
        v: see q.
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        lengths: int32 tensors, in the order of launch.LENGTHS.
        options: causal, window, softcap, scale and return_lse, as in `attention`.
        longest: the longest sequences of queries and of keys, where sequences are packed.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        describe: validates the arguments and returns their Problem.

    Returns:
        (out, lse); None where the operator has to do it.

    Raises:
        Exception: what `describe` and `choose_backend` raise.
    """
    try:
        tensors = q, k, v, *lengths
        addresses = tuple([x.data_ptr() for x in tensors])
        alignment = (addresses[0] | addresses[1] | addresses[2]) & 15
        key = (
            q.shape, k.shape, alignment, _options_key(*options, mask), len(lengths), longest,
            backend,
        )  # fmt: skip
        known = _calls.get(key, ())
    except (AttributeError, TypeError, RuntimeError):
        return None  # wrong, or merely unusual
    if not all(addresses):
        return None
    for found in known:
        if found[0](*tensors):
            return found[1](q, k, v, mask, addresses)  # type: ignore[return-value]
    problem = describe()
    choice = choose_backend(problem, backend)
    if choice.backend not in KERNELS or problem.is_empty:
        return None
    found = Found(guard(*tensors), prepare(choice.backend, problem, q.device), Options.of(problem))
    _keep(key, found)
    return found[1](q, k, v, mask, addresses)  # type: ignore[return-value]


def _keep(key: object, found: Found) -> None:
    if key is None:
        return
    with _lock:
        same = _calls.get(key, ())
        while not same and len(_calls) >= CALLS_MAX:
            del _calls[next(iter(_calls))]  # the oldest
        _calls[key] = (found, *same[: FOUND_MAX - 1])


def _family_key(
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
    recorded: bool,
) -> object:
    """Return what calls of one query a head have in common, however many keys there are; None for
    others. With a window a side is bounded or not by the number of keys."""
    try:
        if q.shape[2] != 1 or not (window is None and (causal is True or causal is False)):
            return None
        alignment = (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
        kind = None
        if mask is not None:
            kind = (*mask.shape[:-1], mask.dtype, mask.device, type(mask), *_mask_key(mask)[5:])
        options = _options_key(causal, window, softcap, scale, return_lse, None)
        key = q.shape, k.shape[:2], k.shape[3], alignment, options, kind, recorded, backend
        hash(key)
    except (AttributeError, IndexError, TypeError, RuntimeError):
        return None  # the call is wrong, or unusual
    return key
