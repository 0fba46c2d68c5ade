"""Provide every public way to attention, as functions of q, k and v, for tests of what surrounds a
call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import flashcore
from flashcore.compat import flash_attn

BATCH, HEADS_Q, HEADS_KV, SEQLEN_Q, SEQLEN_K, DIM, DIM_V = 2, 4, 2, 5, 7, 8, 16
LENGTHS = [(3, 4), (0, 1), (2, 2)]  # packed; then a row of no sequence
SEQLENS_K = [5, 2]


def packed_inputs(
    dtype: torch.dtype = torch.float64, device: str = "cpu", requires_grad: bool = False
) -> tuple[torch.Tensor, ...]:
    return _random(
        (6, HEADS_Q, DIM), (8, HEADS_KV, DIM), (8, HEADS_KV, DIM_V), dtype, device, requires_grad
    )


def dense_inputs(
    dtype: torch.dtype = torch.float64, device: str = "cpu", requires_grad: bool = False
) -> tuple[torch.Tensor, ...]:
    return _random(
        (BATCH, HEADS_Q, SEQLEN_Q, DIM),
        (BATCH, HEADS_KV, SEQLEN_K, DIM),
        (BATCH, HEADS_KV, SEQLEN_K, DIM_V),
        dtype,
        device,
        requires_grad,
    )


def _random(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *shapes, dtype, device, requires_grad = arguments
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(device, dtype).requires_grad_(requires_grad) for x in tensors)


def lengths(device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cu_seqlens_q and cu_seqlens_k."""
    ends = torch.tensor([(0, 0), *LENGTHS]).cumsum(0).to(device, torch.int32)
    return ends[:, 0].contiguous(), ends[:, 1].contiguous()


def varlen(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return flashcore.attention_varlen(q, k, v, *lengths(q.device), 3, 4, **options)


def padded(q: Any, k: Any, v: Any, **options: Any) -> Any:
    seqlens_k = torch.tensor(SEQLENS_K, dtype=torch.int32, device=q.device)
    return flashcore.attention(q, k, v, seqlens_k=seqlens_k, **options)


def _compat(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn.flash_attn_func(q, k, v, causal=True, softcap=3.0)


def _compat_varlen(q: Any, k: Any, v: Any) -> Any:
    return flash_attn.flash_attn_varlen_func(
        q, k, v, *lengths(q.device), 3, 4, causal=True, window_size=(1, 0)
    )


def _drop_in(q: Any, k: Any, v: Any) -> Any:
    return flashcore.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _enabled(q: Any, k: Any, v: Any) -> Any:
    with flashcore.enable():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _with_mask(q: Any, k: Any, v: Any) -> Any:
    mask = torch.linspace(-1.0, 1.0, SEQLEN_K, dtype=torch.float32, device=q.device)
    return flashcore.attention(q, k, v, mask=mask[None], causal="upper_left")


# Each with its inputs.
ROADS: dict[str, tuple[Callable[..., Any], Callable[..., tuple[torch.Tensor, ...]]]] = {
    "dense": (flashcore.attention, dense_inputs),
    "dense, options": (
        lambda *x: flashcore.attention(*x, causal=True, window=(2, 0), softcap=2.0, scale=0.3),
        dense_inputs,
    ),
    "dense, mask": (_with_mask, dense_inputs),
    "padded": (padded, dense_inputs),
    "padded, options": (
        lambda *x: padded(*x, causal=True, window=(2, 0), softcap=2.0, scale=0.3),
        dense_inputs,
    ),
    "packed": (varlen, packed_inputs),
    "packed, options": (
        lambda *x: varlen(*x, causal=True, window=(1, 0), softcap=2.0, scale=0.3),
        packed_inputs,
    ),
    "packed, upper left": (lambda *x: varlen(*x, causal="upper_left"), packed_inputs),
    "compat": (_compat, dense_inputs),
    "compat, packed": (_compat_varlen, packed_inputs),
    "drop-in": (_drop_in, dense_inputs),
    "enabled": (_enabled, dense_inputs),
}
OURS = [name for name in ROADS if name not in ("drop-in", "enabled")]
