"""Define vmap of the operators: the batch that is mapped over joins the tensors' own.

What is not batched is expanded, not copied, where the tensors' own batch is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Join the batch that vmap maps over and the tensor's own into one."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def fold_mask(mask: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """Join the batch that vmap maps over and that of a mask with up to four dimensions that
    broadcast."""
    mask = mask.unsqueeze(0).expand(size, *mask.shape) if dim is None else mask.movedim(dim, 0)
    mask = mask.reshape(size, *(1,) * (5 - mask.dim()), *mask.shape[1:])
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


def forward_vmap(info, in_dims, q, k, v, mask, *arguments):  # type: ignore[no-untyped-def]
    """Compute the forward operator over a batch; arguments as torch.library.register_vmap gives
    them."""
    n, return_lse = info.batch_size, arguments[-2]
    q, k, v = (fold(x, dim, n) for x, dim in zip((q, k, v), in_dims, strict=False))
    if mask is not None:
        mask = fold_mask(mask, in_dims[3], n, q.shape[0] // n)
    out, lse = torch.ops.flashcore.attention_forward(q, k, v, mask, *arguments)
    if not return_lse:
        return (out.unflatten(0, (n, -1)), lse), (0, None)
    return (out.unflatten(0, (n, -1)), lse.unflatten(0, (n, -1))), (0, 0)


def backward_vmap(info, in_dims, dout, dlse, q, k, v, mask, out, lse, *arguments):  # type: ignore[no-untyped-def]
    """Compute the backward operator over a batch. Each of the batch has its own gradient of a
    shared mask."""
    n, needs_mask_grad = info.batch_size, arguments[5]  # behind the options
    dout, dlse, q, k, v, _, out, lse = (
        None if x is None else fold(x, dim, n)
        for x, dim in zip((dout, dlse, q, k, v, None, out, lse), in_dims, strict=False)
    )
    shape: tuple[int, ...] = ()
    if mask is not None:
        dims = list(mask.shape)
        if in_dims[5] is not None:
            del dims[in_dims[5]]
        shape = tuple(dims)
        mask = fold_mask(mask, in_dims[5], n, q.shape[0] // n)
    *gradients, dmask = torch.ops.flashcore.attention_backward(
        dout, dlse, q, k, v, mask, out, lse, *arguments
    )
    gradients = [x.unflatten(0, (n, -1)) for x in gradients]
    if not needs_mask_grad or mask is None:
        return (*gradients, dmask), (0, 0, 0, None)
    dmask = dmask.unflatten(0, (n, -1))
    if len(shape) < 4 or shape[0] == 1:  # broadcast over the batch
        dmask = dmask.sum(1, keepdim=True)
    return (*gradients, dmask.reshape(n, *shape)), (0, 0, 0, 0)
