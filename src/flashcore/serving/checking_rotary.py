"""Check what `attention_with_kvcache` rotates by, as checking.py does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore.problem.validation import check_device, shape_text
from flashcore.serving.checking import check_plain, check_rank, check_vector
from flashcore.serving.rotary import Rotary


def check_rotary(rotary: Rotary, q: Tensor, k_new: Tensor | None, batch: int) -> None:
    """Raise unless cos, sin, and where they are read, fit."""
    for name, x in (("rotary_cos", rotary.cos), ("rotary_sin", rotary.sin)):
        if x is None:
            raise ValueError(f"{name} is missing; a rotation needs rotary_cos and rotary_sin")
        check_rank(name, x, 2, "[positions, rotary_dim / 2]")
        if x.dtype not in (q.dtype, torch.float32):
            raise TypeError(
                f"{name} has dtype {x.dtype}; with q of {q.dtype} it must be that or float32: pass "
                f"{name}.float()"
            )
        check_device(name, x, q)
    if rotary.cos.shape != rotary.sin.shape or rotary.cos.dtype != rotary.sin.dtype:
        raise ValueError(
            f"rotary_sin is {rotary.sin.dtype} {shape_text(rotary.sin)} but rotary_cos is "
            f"{rotary.cos.dtype} {shape_text(rotary.cos)}; they must be alike"
        )
    rows, half = rotary.cos.shape
    if rows == 0 or half == 0 or 2 * half > q.shape[-1]:
        raise ValueError(
            f"rotary_cos has shape {shape_text(rotary.cos)}; it must be [positions, rotary_dim / "
            f"2], neither 0, with rotary_dim at most head_dim {q.shape[-1]}: of a table for each "
            "element pass one entry a pair, cos[:, : rotary_dim // 2]"
        )
    if not isinstance(rotary.interleaved, bool):
        raise TypeError(
            f"rotary_interleaved={rotary.interleaved!r} must be True (elements 0 and 1, 2 and 3 "
            "... are pairs, as GPT-J has them) or False (0 and rotary_dim / 2, 1 and rotary_dim / "
            "2 + 1 ..., as Llama and GPT-NeoX); a wrong one gives wrong results silently, so there "
            "is no default"
        )
    if rotary.offsets is not None:
        if rotary.positions is not None:
            raise ValueError("rotary_offsets and rotary_positions are both given; pass one")
        meaning = "the position of each sequence's first new token"
        check_vector("rotary_offsets", rotary.offsets, q, batch, meaning)
    if rotary.positions is not None:
        _check_positions(rotary.positions, q, k_new)


def _check_positions(positions: Tensor, q: Tensor, k_new: Tensor | None) -> None:
    wanted, new = (
        None if x is None else (x.shape[0],) if x.dim() == 3 else (x.shape[0], x.shape[2])
        for x in (q, k_new)
    )
    assert wanted is not None
    check_plain("rotary_positions", positions)
    if positions.dtype != torch.int32:
        raise TypeError(
            f"rotary_positions has dtype {positions.dtype}; it must be int32: pass "
            "rotary_positions.int()"
        )
    if tuple(positions.shape) != wanted or positions.device != q.device:
        raise ValueError(
            f"rotary_positions has shape {shape_text(positions)} on {positions.device}; it must "
            f"have one entry a query, {list(wanted)} on {q.device}"
        )
    if new is not None and new != wanted:
        raise ValueError(
            f"rotary_positions is given for {list(wanted)} queries and {list(new)} new tokens; "
            "each new token must be a query: pass rotary_offsets instead"
        )
