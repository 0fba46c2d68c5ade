"""Hold the arguments of one step of a decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

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


def rotary_of(
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool | None,
    offsets: Tensor | None,
    positions: Tensor | None,
) -> Rotary | None:
    """Return what rotates, of the arguments that say so; None for nothing.

    Raises:
        ValueError: positions without angles.
    """
    if cos is not None or sin is not None:
        by: Any = cos, sin, interleaved, offsets, positions  # some may be missing: check_rotary
        return Rotary(*by)
    if offsets is not None or positions is not None:
        raise ValueError("rotary_offsets or rotary_positions is given without rotary_cos")
    return None
