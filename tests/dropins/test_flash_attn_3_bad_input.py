"""Refuse what flash-attn 3's functions take and flashcore does not, by the argument's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.compat import flash_attn_3

INT32 = torch.int32
ONES = torch.ones(2)


def ends(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(INT32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"qv": ONES}, r"qv \(a tensor \[2\]\) is not supported.*torch\.cat"),
        ({"attention_chunk": 4}, r"attention_chunk \(4\)"),
        ({"seqused_q": ONES}, "seqused_q .*cu_seqlens_q"),
        ({"cp_world_size": 2}, r"cp_world_size \(2\).*flashcore\.merge"),
        ({"dropout_p": 0.1}, r"dropout_p=0\.1"),
    ],
)
def test_what_is_not_supported_raises_and_names_the_argument(
    options: dict[str, Any], words: str
) -> None:
    x = torch.randn(8, 2, 16)
    with pytest.raises(NotImplementedError, match=words):
        flash_attn_3.flash_attn_varlen_func(x, x, x, ends(8), ends(8), 8, 8, **options)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"block_table": torch.ones(1, 1, dtype=INT32)}, ValueError, "block_table.*seqused_k"),
        ({"max_seqlen_q": None}, TypeError, "max_seqlen_q is missing"),
        ({"cu_seqlens_q": None}, ValueError, "cu_seqlens_k is given without cu_seqlens_q"),
        ({"out": torch.ones(3)}, ValueError, "out is torch.float32"),
        ({"q": torch.ones(8, 2, 16, requires_grad=True), "seqused_k": torch.ones(1, dtype=INT32)},
         NotImplementedError, "no backward pass"),
        ({"k": torch.ones(8, 2, 16).to(torch.float8_e4m3fn)}, TypeError, "k has dtype"),
    ],
)  # fmt: skip
def test_wrong_packed_calls(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    x = torch.randn(8, 2, 16)
    given = {"q": x, "k": x, "v": x, "cu_seqlens_q": ends(8), "cu_seqlens_k": ends(8)}
    with pytest.raises(kind, match=words):
        flash_attn_3.flash_attn_varlen_func(
            **given | {"max_seqlen_q": 8, "max_seqlen_k": 8} | options
        )
