"""Hold the arguments of one step of a decoder."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flashcore.serving.rotary import Rotary


class Step(NamedTuple):
    """A Step holds the arguments of one call of `attention_with_kvcache`, but for those that it
    shares with `attention` and `attention_varlen`; `rotary` has those on rotation."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_new: Tensor | None
    v_new: Tensor | None
    seqlens_k: Tensor
    page_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_new: Tensor | None
    max_seqlen_q: int | Tensor | None
    rotary: Rotary | None
    mask: Tensor | None
    tree_mask: Tensor | None
    return_lse: bool
    out: Tensor | None
    lse: Tensor | None
    backend: str
