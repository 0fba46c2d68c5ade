"""Turn the shapes that torch's scaled_dot_product_attention takes, as views of four dimensions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

# Classes that mean nothing of their own: torch traces with the last two.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


class View(NamedTuple):
    """A view is a call in the shape of `attention`.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: up to four dimensions, or None.
        out_shape: what torch's output has.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    out_shape: tuple[int, ...]


def as_4d(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    enable_gqa: bool,
) -> View | None:
    """Return the call in the shape of `attention`.

    Args:
        q: [..., num_heads_q, seqlen_q, head_dim], or without heads; k and v have the same rank.
        k: [..., num_heads_kv, seqlen_k, head_dim].
        v: [..., num_heads_kv, seqlen_k, head_dim_v].
        mask: broadcastable to [..., num_heads_q, seqlen_q, seqlen_k], or None.
        enable_gqa: as in torch; without it heads broadcast as the batch does.

    Returns:
        The view; None if the call is wrong, or repeats the heads of k and v differently.
    """
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return None
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return None
    leads = [x.shape[:-2] for x in (q, k, v)]
    if enable_gqa:
        if not all(leads):
            return None
        heads_q, heads_kv, heads_v = (lead[-1] for lead in leads)
        if heads_kv != heads_v or heads_q % heads_kv:
            return None
        leads = [lead[:-1] for lead in leads]
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        return None
    if enable_gqa:
        batch, head_shape = lead, (heads_q,)
    else:
        # A single head of k and v broadcasts to those of q: the kernels read it in place.
        batch, head_shape = lead[:-1], lead[-1:]
        heads_q = lead[-1] if lead else 1
        single = all(not x.shape[:-2] or x.shape[-3] == 1 for x in (k, v))
        heads_kv = 1 if single else heads_q
    mask_4d = None
    if mask is not None:
        mask_4d = _mask_as_4d(mask, q, batch, head_shape, k.shape[-2])
        if mask_4d is None:
            return None
    out_shape = (*batch, *head_shape, q.shape[-2], v.shape[-1])
    heads = (heads_q, heads_kv, heads_kv)
    q, k, v = (_expanded(x, batch, h) for x, h in zip((q, k, v), heads, strict=True))
    return View(q, k, v, mask_4d, out_shape)


def _expanded(x: torch.Tensor, batch: tuple[int, ...], heads: int) -> torch.Tensor:
    """Return [batch..., heads, rows, columns] with the batch dimensions made one."""
    shape = (*batch, heads, *x.shape[-2:])
    if x.shape != shape:
        x = x.expand(shape)
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *shape[-3:])


def _mask_as_4d(
    mask: torch.Tensor,
    q: torch.Tensor,
    batch: tuple[int, ...],
    head_shape: tuple[int, ...],
    seqlen_k: int,
) -> torch.Tensor | None:
    """Return the mask with at most one batch dimension, broadcast sizes kept; None if torch must
    judge."""
    if mask.dtype not in (torch.bool, q.dtype, torch.float32) or mask.device != q.device:
        return None
    if mask.layout != torch.strided or type(mask) not in PLAIN_TYPES:
        return None
    target = (*batch, *head_shape, q.shape[-2], seqlen_k)
    if not 2 <= mask.dim() <= len(target):
        return None
    pairs: Any = zip(mask.shape, target[len(target) - mask.dim() :], strict=True)
    if any(have not in (1, want) for have, want in pairs):
        return None
    if mask.dim() <= 4 and len(batch) <= 1:
        return mask
    mask = mask[(None,) * (len(target) - mask.dim())]
    if any(size != 1 for size in mask.shape[: len(batch)]):
        mask = mask.expand(*batch, *mask.shape[len(batch) :])
    return mask.flatten(0, len(batch) - 1)
