"""Remember which calls were checked: another of the same description need not be.

A check looks at types, shapes, strides, dtypes and devices of tensors and at options, never at what
tensors hold, so one call stands for all that are described alike (ops/calls.py does the same for
what computes a call).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flashcore.base import forks
from flashcore.ops.guards import guard
from flashcore.ops.keys import options_key, remember

KEYS_MAX = 1024
GUARDS_MAX = 16  # under one key

_known: dict[object, tuple[Callable[..., bool], ...]] = {}
_lock = forks.lock()
_is_grad_enabled = torch.is_grad_enabled  # looked up once, not in every call


def key_of(
    tensors: tuple[Any, ...], asked: tuple[object, ...], options: dict[str, Any], return_lse: bool
) -> object:
    """Return a key of a call's options and of which tensors it has; None where it has to be
    checked each time."""
    if is_compiling() or isinstance(asked[0], Tensor):
        return None
    try:
        scalars = options_key(
            options["causal"], options["window"], options["softcap"], options["scale"],
            return_lse, False, None,
        )  # fmt: skip
        missing = tuple([x is None for x in tensors])
        key = tensors[0].shape, tensors[1].shape, missing, asked, scalars, _is_grad_enabled()
        hash(key)
    except (AttributeError, TypeError):
        return None  # something is wrong, or merely unusual
    return key


def is_known(key: object, tensors: tuple[Any, ...]) -> bool:
    """Return whether a call of this description was checked."""
    if key is None:
        return False
    guards = _known.get(key)
    if guards is None:
        return False
    given = [x for x in tensors if x is not None]
    for fits in guards:  # noqa: SIM110 - a generator takes as long again
        if fits(*given):
            return True
    return False


def keep(key: object, tensors: tuple[Any, ...]) -> None:
    """Remember a call that was checked, unless its key is None."""
    if key is None:
        return
    fits = guard(*(x for x in tensors if x is not None))
    remember(_known, _lock, key, fits, KEYS_MAX, GUARDS_MAX)
