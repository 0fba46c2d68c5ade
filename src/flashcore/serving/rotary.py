"""Rotate queries and keys by their positions (rotary embedding), by operations of torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashcore.serving.rows import Rows


class Rotary(NamedTuple):
    """Hold what rotates a call's queries and new keys.

    Args:
        cos: [positions, rotary_dim / 2], of each pair of elements at each position.
        sin: likewise.
        interleaved: whether elements 0 and 1, 2 and 3 ... make pairs, or 0 and rotary_dim / 2 ...
        offsets: int32, [batch]: the position of each sequence's first new token; None: behind what
            the cache has.
        positions: int32, [batch, seqlen_q] or [total_q], of each token; instead of offsets.
        queries: where they stand. "end": the last at the last new token, as causal masks have it;
            "begin": the first at the first new token; "first": all of them at that.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    offsets: Tensor | None = None
    positions: Tensor | None = None
    queries: str = "end"

    def positions_of(self, rows: Rows, before: Tensor, ahead: Tensor | int = 0) -> Tensor:
        """Return the position of each row.

        Args:
            rows: of queries or of new keys.
            before: int32, [batch]: tokens in the cache, from 0 to what it has room for.
            ahead: the row's token 0 is so many positions after a sequence's first new
                token: int32, [batch], or an int for all.
        """
        if self.positions is not None:
            return self.positions.long()
        base = before if self.offsets is None else self.offsets
        return (base.long() + ahead)[rows.sequence] + rows.token

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Return a tensor rotated; computed in float32 (float64 for float64) and rounded once.

        Args:
            x: [batch, num_heads, seqlen, head_dim] or [total, num_heads, head_dim].
            position: integers, [batch or 1, seqlen] or [total]; clamped to the rows of cos.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        position = position.clamp(0, self.cos.shape[0] - 1)
        cos, sin = (t[position].to(dtype).unsqueeze(1) for t in (self.cos, self.sin))
        half = self.cos.shape[1]
        turned = x[..., : 2 * half].to(dtype)
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned[..., :half], turned[..., half:]
        pair = a * cos - b * sin, a * sin + b * cos
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)
