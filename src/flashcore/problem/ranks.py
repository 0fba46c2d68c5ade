"""Call `attention` of tensors with no batch dimension, or with several.

They become the [batch, num_heads, seqlen, head_dim] that everything else works on, and back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.problem.validation import shape_text

Result = Tensor | tuple[Tensor, ...]


def has_other_rank(q: object, k: object, v: object) -> bool:
    """Return whether q, k and v are dense tensors that agree in a number of dimensions other than
    4. Other faults of theirs are found later."""
    if isinstance(q, Tensor) and q.dim() == 4:
        return False
    tensors = [x for x in (q, k, v) if isinstance(x, Tensor)]
    if len(tensors) < 3 or any(x.layout != torch.strided or x.is_nested for x in tensors):
        return False
    ranks = {x.dim() for x in tensors}
    return len(ranks) == 1 and 4 not in ranks and min(ranks) >= 2


class Ranked(NamedTuple):
    """Ranked is a call in the shape that everything else works on.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim]; a view, unless several batch dimensions are no
            single one in memory. So are k and v.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: up to four dimensions, or None.
        seqlens_k: [batch], or None.
        lead: the dimensions of q that stand before seqlen_q.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seqlens_k: Tensor | None
    lead: tuple[int, ...]

    def restored(self, result: Result) -> Result:
        """Return results as the caller's dimensions have them."""
        if isinstance(result, tuple):
            return tuple(x.reshape((*self.lead, *x.shape[2:])) for x in result)
        return result.reshape(*self.lead, *result.shape[2:])


def as_rank_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seqlens_k: Tensor | None = None,
) -> Ranked:
    """Return the call with one batch dimension.

    Args:
        q: [..., num_heads_q, seqlen_q, head_dim], or [seqlen_q, head_dim] for a single head.
        k: [..., num_heads_kv, seqlen_k, head_dim], as many dimensions.
        v: [..., num_heads_kv, seqlen_k, head_dim_v], as many dimensions.
        mask: broadcastable to [..., num_heads_q, seqlen_q, seqlen_k], or None.
        seqlens_k: the shape of the batch dimensions, or None.

    Raises:
        ValueError: batch dimensions that do not fit.
    """
    lead = tuple(q.shape[:-2])
    batch = lead[:-1]
    for name, x in (("k", k), ("v", v)):
        if x.shape[:-3] != batch:
            raise ValueError(
                f"{name} has shape {shape_text(x)} but q has {shape_text(q)}: the dimensions "
                f"before num_heads are the batch's, and must be equal; {name}.expand(...) makes no "
                "copy"
            )
    if isinstance(seqlens_k, Tensor) and seqlens_k.shape == batch:
        seqlens_k = seqlens_k.reshape(-1)
    return Ranked(_one_batch(q), _one_batch(k), _one_batch(v), _mask(mask, batch), seqlens_k, lead)


def _one_batch(x: Tensor) -> Tensor:
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x if x.dim() == 4 else x.flatten(0, x.dim() - 4)


def _mask(mask: Any, batch: tuple[int, ...]) -> Any:
    if not isinstance(mask, Tensor) or mask.dim() <= 3 or not batch:
        return mask
    own = (1,) * (len(batch) + 3 - mask.dim()) + tuple(mask.shape[:-3])
    if len(own) != len(batch) or any(
        have not in (1, want) for have, want in zip(own, batch, strict=True)
    ):
        raise ValueError(
            f"mask has shape {shape_text(mask)}, which does not broadcast to "
            f"[..., num_heads_q, seqlen_q, seqlen_k] with batch dimensions {list(batch)}"
        )
    mask = mask.reshape(*own, *mask.shape[-3:])
    if math.prod(own) != 1:
        mask = mask.expand(*batch, *mask.shape[-3:])
    return mask.flatten(0, len(batch) - 1)
