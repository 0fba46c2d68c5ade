"""Define vmap of the operators that take lengths: a padded batch grows, packed rows get more heads.

Packed sequences of other lengths in each sample are computed one sample after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.ops.batching import fold, fold_mask

Dims = tuple[int | None, ...]


def padded_forward_vmap(info: Any, in_dims: Dims, *inputs: Any) -> tuple[Any, Any]:
    """Compute `attention_padded_forward` over a batch; arguments as torch.library.register_vmap
    wants."""
    n = info.batch_size
    out, lse = torch.ops.flashcore.attention_padded_forward(
        *_folded(n, in_dims, *inputs[:5]), *inputs[5:]
    )
    return (_unfolded(out, n), _unfolded(lse, n)), (0, 0)


def padded_backward_vmap(info: Any, in_dims: Dims, *inputs: Any) -> tuple[Any, Any]:
    """Compute `attention_padded_backward` over a batch."""
    n = info.batch_size
    of_out = [_or_none(x, dim, n) for x, dim in zip(inputs[:4], in_dims, strict=False)]
    gradients = torch.ops.flashcore.attention_padded_backward(
        *of_out, *_folded(n, in_dims[4:], *inputs[4:9]), *inputs[9:]
    )
    return tuple(_unfolded(x, n) for x in gradients), (0, 0, 0)


def _folded(
    n: int, in_dims: Dims, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v = (fold(x, dim, n) for x, dim in zip((q, k, v), in_dims, strict=False))
    if mask is not None:
        mask = fold_mask(mask, in_dims[3], n, q.shape[0] // n)
    return q, k, v, mask, fold(lengths, in_dims[4], n).contiguous()


def _or_none(x: Tensor | None, dim: int | None, n: int) -> Tensor | None:
    return None if x is None else fold(x, dim, n)


def _unfolded(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (n, x.shape[0] // n))


def varlen_forward_vmap(info: Any, in_dims: Dims, *inputs: Any) -> tuple[Any, Any]:
    """Compute `attention_varlen_forward` over a batch."""
    operator, n = torch.ops.flashcore.attention_varlen_forward, info.batch_size
    if not _same_lengths(in_dims[3:5]):
        return _one_by_one(operator, n, in_dims, inputs)
    qkv = [_more_heads(x, dim, n, 1) for x, dim in zip(inputs[:3], in_dims, strict=False)]
    out, lse = operator(*qkv, *inputs[3:])
    return (_fewer_heads(out, n, 1), _fewer_heads(lse, n, 0)), (1, 0)


def varlen_backward_vmap(info: Any, in_dims: Dims, *inputs: Any) -> tuple[Any, Any]:
    """Compute `attention_varlen_backward` over a batch."""
    operator, n = torch.ops.flashcore.attention_varlen_backward, info.batch_size
    if not _same_lengths(in_dims[7:9]):
        return _one_by_one(operator, n, in_dims, inputs)
    heads = (1, 0, 1, 0, 1, 1, 1)  # where they stand in dout, dlse, out, lse, q, k and v
    tensors = [
        None if x is None else _more_heads(x, dim, n, place)
        for x, dim, place in zip(inputs[:7], in_dims[:7], heads, strict=True)
    ]
    gradients = operator(*tensors, *inputs[7:])
    return tuple(_fewer_heads(x, n, 1) for x in gradients), (1, 1, 1)


def _same_lengths(in_dims: Dims) -> bool:
    return all(dim is None for dim in in_dims)


def _more_heads(x: Tensor, dim: int | None, n: int, place: int) -> Tensor:
    """Join the batch that vmap maps over and the heads at `place` into one."""
    x = x.unsqueeze(0).expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, place).flatten(place, place + 1)


def _fewer_heads(x: Tensor, n: int, place: int) -> Tensor:
    return x.unflatten(place, (n, x.shape[place] // n))


def _one_by_one(
    operator: Any, n: int, in_dims: Dims, inputs: tuple[Any, ...]
) -> tuple[Any, tuple[int, ...]]:
    pairs = list(zip(inputs, in_dims, strict=True))
    samples = [
        operator(*(x if dim is None else x.select(dim, i).contiguous() for x, dim in pairs))
        for i in range(n)
    ]
    results = tuple(torch.stack(x) for x in zip(*samples, strict=True))
    return results, (0,) * len(results)
