"""Make keys under which calls are remembered, and keep what is remembered under them.

A key is what tells the arguments of one call from another's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor

from flashcore.base.bounded import make_room
from flashcore.problem import Causal, Window

_Entry = TypeVar("_Entry")


def remember(
    known: dict[object, tuple[_Entry, ...]],
    lock: AbstractContextManager[Any],
    key: object,
    entry: _Entry,
    keys_max: int,
    entries_max: int,
) -> None:
    """Put an entry first under a key. The oldest entry of the key, or of a new one the oldest keys,
    make room for it.

    Args:
        known: entries by key.
        lock: held by whoever changes `known`.
        key: of the call.
        entry: for this key.
        keys_max: how many keys there may be.
        entries_max: how many entries a key may have.
    """
    with lock:
        same = known.get(key, ())
        if not same:
            make_room(known, keys_max)
        known[key] = (entry, *same[: entries_max - 1])


def options_key(
    causal: Causal,
    window: Window,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
    return_max_score: bool,
    mask: Tensor | None,
) -> tuple[object, ...]:
    """Return a key of the options; types are in it because 1 == True == 1.0, and not all of them
    are valid."""
    return (
        causal, type(causal), scale, type(scale), softcap, type(softcap),
        window if window is None else (type(window), *window, *map(type, window)),
        return_lse, type(return_lse), return_max_score, type(return_max_score),
        None if mask is None else mask_key(mask),
    )  # fmt: skip


def mask_key(mask: Tensor) -> tuple[object, ...]:
    """Return a key of how a mask is read."""
    address = mask.data_ptr()
    if not address:
        raise RuntimeError("a mask without memory")
    return mask.shape, mask.stride(), address & 15, mask.dtype, mask.device, mask.is_neg()


def family_key(
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
            kind = (*mask.shape[:-1], mask.dtype, mask.device, type(mask), *mask_key(mask)[5:])
        options = options_key(causal, window, softcap, scale, return_lse, False, None)
        key = q.shape, k.shape[:2], k.shape[3], alignment, options, kind, recorded, backend
        hash(key)
    except (AttributeError, IndexError, TypeError, RuntimeError):
        return None  # the call is wrong, or unusual
    return key
