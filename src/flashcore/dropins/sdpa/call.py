"""Hold the arguments of a call of scaled_dot_product_attention."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Arguments(NamedTuple):
    """Arguments are those of one call, as torch names them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return the arguments that are tensors, or should be."""
        required = [self.query, self.key, self.value]
        return required if self.attn_mask is None else [*required, self.attn_mask]
