"""aten's flash operators by flashcore: the same arguments, the same results, laid out alike.

The results have the shapes and strides that torch's fakes give them: out is laid out as
`torch.empty_like(query)`. Causal masks and windows are aligned at the last query and the last key,
as FlashAttention-2's are, and as flashcore's are by default. A row with nothing to attend to has
lse -inf, as in FlashAttention-3 and -4, which use the same door (in FlashAttention-2 it is +inf):
so results can be merged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcore.api import attention
from flashcore.backends import torch_own
from flashcore.backends.dispatch import without_autocast
from flashcore.dropins.aten_fallback import by_torch, lengths_obstacle, obstacle
from flashcore.dropins.flash_kvcache import attend_over_pages, rows_as_pages
from flashcore.ops import varlen
from flashcore.ops.calls import attend
from flashcore.ops.family import BackwardCall
from flashcore.ops.rings import attention_backward
from flashcore.problem.memory_layout import with_strides_of_empty_like
from flashcore.problem.options import Inputs, Options, Results

FORWARD = "_flash_attention_forward"
IN_PLACE = "_flash_attention_forward_no_dropout_inplace"
BACKWARD = torch_own.FLASH_BACKWARD
SDPA_FORWARD = "_scaled_dot_product_flash_attention"
SDPA_BACKWARD = "_scaled_dot_product_flash_attention_backward"

Window = tuple[int, int]


def functions(backend: str, key: str) -> dict[str, Callable[..., Any]]:
    """Return what replaces the operators' kernels.

    Args:
        backend: of `attention`.
        key: the dispatch key that they will be registered for, "CUDA" or "CPU".

    Returns:
        By the operator's name, a function of its arguments.
    """
    by_name: dict[str, Callable[..., Any]] = {
        FORWARD: _forward,
        IN_PLACE: _forward_in_place,
        BACKWARD: _backward,
        SDPA_FORWARD: _sdpa_forward,
        SDPA_BACKWARD: _sdpa_backward,
    }
    return {name: functools.partial(f, backend, key) for name, f in by_name.items()}


def _auxiliary(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the random numbers' state, which nobody reads without dropout, and no debug mask."""
    rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    return rng_state, unused, torch.empty(0, dtype=q.dtype, device=q.device)


def _window(left: int | None, right: int | None) -> Window | None:
    """Return the window as `attention` takes it; the operators know None and -1 for all."""
    window = (
        -1 if left is None or left < 0 else left,
        -1 if right is None or right < 0 else right,
    )
    return None if window == (-1, -1) else window


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: Window | None,
    scale: float | None,
    seqused_k: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of [batch, num_heads, seqlen, head_dim] tensors."""
    with torch.no_grad(), without_autocast(q.device.type):
        if seqused_k is not None:
            return attention(
                q, k, v, causal=causal, window=window, scale=scale, seqlens_k=seqused_k,
                return_lse=True, backend=backend,
            )  # fmt: skip
        out, lse = attend(q, k, v, None, causal, window, None, scale, True, backend)
    return out, lse


def _sdpa_forward(
    backend: str,
    key_: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    reason = obstacle(backend, query, key, value, dropout_p, scale)
    if reason is None and return_debug_mask:
        reason = "return_debug_mask"
    if reason is not None:
        arguments = query, key, value, dropout_p, is_causal, return_debug_mask
        return tuple(by_torch(reason, SDPA_FORWARD, key_, *arguments, scale=scale))
    out, lse = _dense(query, key, value, is_causal, None, scale, None, backend)
    sizes = None, None, query.shape[2], key.shape[2]
    return with_strides_of_empty_like(query, out), lse, *sizes, *_auxiliary(query)


def _sdpa_backward(
    backend: str,
    key_: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    reason = obstacle(backend, query, key, value, dropout_p, scale)
    if reason is not None:
        arguments = (
            grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
            dropout_p, is_causal, philox_seed, philox_offset,
        )  # fmt: skip
        return tuple(by_torch(reason, SDPA_BACKWARD, key_, *arguments, scale=scale))
    return _dense_backward(
        grad_out, query, key, value, out, logsumexp, is_causal, None, scale, backend
    )


def _dense_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: Window | None,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of [batch, num_heads, seqlen, head_dim] tensors, laid out as they are."""
    return attention_backward(
        grad_out.to(q.dtype), q, k, v, out, lse,
        causal=causal, window=window, scale=scale, backend=backend,
    )  # fmt: skip


def _forward(
    backend: str,
    key_: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Any, ...]:
    reason = lengths_obstacle(cum_seq_q, cum_seq_k, seqused_k, block_table, num_splits)
    if reason is None and alibi_slopes is not None:
        reason = "alibi_slopes"
    if reason is None and return_debug_mask:
        reason = "return_debug_mask"
    if reason is None:
        rank = 4 if cum_seq_q is None else 3
        of_keys = (key, value) if block_table is None else (key.select(1, 0), value.select(1, 0))
        reason = obstacle(backend, query, *of_keys, dropout_p, scale, rank)
    if reason is not None:
        arguments = (
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
            return_debug_mask,
        )  # fmt: skip
        options: dict[str, Any] = {
            "scale": scale,
            "window_size_left": window_size_left,
            "window_size_right": window_size_right,
            "seqused_k": seqused_k,
            "alibi_slopes": alibi_slopes,
        }
        # Older versions of the operator do not have them.
        newer = {"block_table": block_table, "num_splits": num_splits}
        options |= {name: x for name, x in newer.items() if x is not None}
        return tuple(by_torch(reason, FORWARD, key_, *arguments, **options))
    window = _window(window_size_left, window_size_right)
    if cum_seq_q is not None and (seqused_k is not None or block_table is not None):
        out, lse = _over_pages(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, window, scale,
            seqused_k, block_table, backend,
        )  # fmt: skip
    elif cum_seq_q is not None:
        assert cum_seq_k is not None
        with torch.no_grad(), without_autocast(query.device.type):
            out, lse = varlen.attention_varlen(
                query, key, value, cum_seq_q, cum_seq_k, max_q, max_k,
                causal=is_causal, scale=scale, window=window, return_lse=True, backend=backend,
            )  # fmt: skip
    else:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse = _dense(q, k, v, is_causal, window, scale, seqused_k, backend)
        out = out.transpose(1, 2)
    return with_strides_of_empty_like(query, out), lse, *_auxiliary(query)


def _over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    window: Window | None,
    scale: float | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of packed queries over keys in pages, or over the first of packed keys."""
    if seqused_k is None:
        assert cum_seq_k is not None
        seqused_k = cum_seq_k.diff()
    if block_table is None:
        assert cum_seq_k is not None
        block_table = rows_as_pages(cum_seq_k, min(max_k, k.shape[0]))
        k, v = k.unsqueeze(1), v.unsqueeze(1)
    with torch.no_grad():
        result = attend_over_pages(
            q, k, v, cum_seq_q, max_q, seqused_k, block_table, scale, causal, window or (-1, -1),
            0.0, None, True, backend=backend,
        )  # fmt: skip
    assert isinstance(result, tuple)
    return result


def _forward_in_place(
    backend: str, key_: str, out: Tensor, *arguments: Any, **options: Any
) -> Tensor:
    """Compute `_forward`, write out, and return lse alone."""
    result, lse, *_ = _forward(backend, key_, *arguments, **options)
    out.copy_(result)
    return lse


def _backward(
    backend: str,
    key_: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    reason = lengths_obstacle(cum_seq_q, cum_seq_k, None, None, None)
    if reason is None:
        rank = 4 if cum_seq_q is None else 3
        reason = obstacle(backend, query, key, value, dropout_p, scale, rank)
    if reason is not None:
        arguments = (
            grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
            dropout_p, is_causal, rng_state, unused,
        )  # fmt: skip
        options = {
            "scale": scale,
            "window_size_left": window_size_left,
            "window_size_right": window_size_right,
        }
        return tuple(by_torch(reason, BACKWARD, key_, *arguments, **options))
    window = _window(window_size_left, window_size_right)
    if cum_seq_q is None:
        dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        gradients = _dense_backward(dout, q, k, v, o, logsumexp, is_causal, window, scale, backend)
        return tuple(x.transpose(1, 2) for x in gradients)
    checked = Options.checked(is_causal, window, None, scale)
    with torch.no_grad():
        call = BackwardCall(
            Results(grad_out.to(query.dtype), None),
            Inputs(query, key, value, None, None, cum_seq_q, cum_seq_k, max_q, max_k),
            Results(out, logsumexp),
            checked,
            (False,),  # there are no sinks
            backend,
        )
        return varlen.OPERATORS.gradients(call)[:3]
