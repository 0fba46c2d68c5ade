"""What was decided for a description of tensors is looked up, not decided again.

Everything that a call of `attention` depends on besides addresses and values (shapes, strides,
dtypes, devices, alignment, options) makes a key; under it lies a function that only allocates and
launches.
"""

from __future__ import annotations

import threading

from torch import Tensor

from flashcore.dispatch import Call, choose_backend, prepare, warn_once
from flashcore.options import Options
from flashcore.problem import Causal, Problem, Window

CALLS_MAX = 1024

_calls: dict[object, tuple[Call, Options]] = {}
_lock = threading.Lock()


def find_call(
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
) -> tuple[Call, Options]:
    """What computes a call of `attention`, and its options.

    Args:
        q: as in `attention`, like all the arguments that follow.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: as in `attention`.
        causal: as in `attention`.
        window: as in `attention`.
        softcap: as in `attention`.
        scale: as in `attention`.
        return_lse: as in `attention`.
        backend: as in `attention`.
        recorded: whether lse is needed in any case.

    Returns:
        A function of q, k, v and mask (see dispatch.prepare), and the options, validated.

    Raises:
        Exception: what `attention` raises.
    """
    key = None
    try:
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        # Without memory it is a stand-in for a tensor, whatever else it looks like, or empty.
        if at_q and at_k and at_v:
            # Types are in it because 1 == True == 1.0, and not all of them are valid.
            key = (
                q.shape, q.stride(), q.dtype, q.device, q.is_neg(),
                k.shape, k.stride(), k.dtype, k.get_device(), k.is_neg(),
                v.shape, v.stride(), v.dtype, v.get_device(), v.is_neg(),
                (at_q | at_k | at_v) & 15, None if mask is None else _mask_key(mask),
                causal, type(causal), scale, type(scale), softcap, type(softcap),
                window if window is None else (type(window), *window, *map(type, window)),
                return_lse, type(return_lse), recorded, backend,
            )  # fmt: skip
            found = _calls.get(key)
            if found is not None:
                return found
    except (AttributeError, TypeError, RuntimeError):
        key = None  # something is wrong, or merely not hashable; now it is looked at closely
    problem = Problem.from_tensors(
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        mask=mask,
        return_lse=return_lse or recorded,
    )
    choice = choose_backend(problem, backend)
    if choice.is_fallback:
        warn_once(choice)
    found = prepare(choice.backend, problem, q.device), Options.of(problem)
    # The simulator's depends on environment variables.
    if key is not None and choice.backend != "sim":
        _keep(key, found)
    return found


def _mask_key(mask: Tensor) -> tuple[object, ...]:
    if not mask.data_ptr():
        raise RuntimeError("a mask without memory")
    return mask.shape, mask.stride(), mask.dtype, mask.device, mask.is_neg()


def _keep(key: object, found: tuple[Call, Options]) -> None:
    with _lock:
        while len(_calls) >= CALLS_MAX:
            del _calls[next(iter(_calls))]  # the oldest
        _calls[key] = found
