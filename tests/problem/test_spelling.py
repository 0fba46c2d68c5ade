"""Test keyword arguments as other libraries spell them: what the error says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashcore
from flashcore.compat import flash_attn
from flashcore.problem import spelling

Q = torch.zeros(1, 2, 3, 8)
CU = torch.tensor([0, 3]).int()
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, str]]] = {
    "attention": (flashcore.attention, (Q, Q, Q), spelling.OF_ATTENTION),
    "explain": (flashcore.explain, (Q, Q, Q), spelling.OF_ATTENTION),
    "attention_varlen": (
        flashcore.attention_varlen, (Q[0], Q[0], Q[0], CU, CU, 3, 3), spelling.OF_VARLEN
    ),
    "explain_varlen": (
        flashcore.explain_varlen, (Q[0], Q[0], Q[0], CU, CU, 3, 3), spelling.OF_VARLEN
    ),
    "scaled_dot_product_attention": (
        flashcore.scaled_dot_product_attention, (Q, Q, Q), spelling.OF_SDPA
    ),
    "flash_attn_func": (flash_attn.flash_attn_func, (Q, Q, Q), spelling.OF_FLASH_ATTN),
    "flash_attn_kvpacked_func": (
        flash_attn.flash_attn_kvpacked_func, (Q, Q), spelling.OF_FLASH_ATTN
    ),
    "flash_attn_qkvpacked_func": (
        flash_attn.flash_attn_qkvpacked_func, (Q,), spelling.OF_FLASH_ATTN
    ),
    "flash_attn_varlen_func": (
        flash_attn.flash_attn_varlen_func, (Q, Q, Q, CU, CU, 3, 3), spelling.OF_FLASH_ATTN
    ),
    "flash_attn_varlen_kvpacked_func": (
        flash_attn.flash_attn_varlen_kvpacked_func, (Q, Q, CU, CU, 3, 3), spelling.OF_FLASH_ATTN
    ),
    "flash_attn_varlen_qkvpacked_func": (
        flash_attn.flash_attn_varlen_qkvpacked_func, (Q, CU, 3), spelling.OF_FLASH_ATTN
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_spelling_of_others_is_answered(name: str) -> None:
    function, positional, known = FUNCTIONS[name]
    for other, hint in known.items():
        if other in inspect.signature(function).parameters:
            continue  # in one of the functions that share the names it is an argument
        with pytest.raises(TypeError) as caught:
            function(*positional, **{other: None})
        assert str(caught.value) == f"{name}() has no argument {other!r}: {hint}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_nobody_spells_like_that(name: str) -> None:
    function, positional, _ = FUNCTIONS[name]
    with pytest.raises(TypeError, match=r"no argument 'nonsense': its arguments are \w+, \w+"):
        function(*positional, nonsense=1)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("is_causal", 'did you mean causal="upper_left"'),
        ("softmax_scale", "did you mean scale="),
        ("attn_mask", "did you mean mask="),
        ("dropout_p", "no dropout"),
        ("casual", "did you mean causal="),
        ("windows", "did you mean window="),
        ("return_les", "did you mean return_lse="),
    ],
)
def test_attention_says_what_is_meant(given: str, meant: str) -> None:
    with pytest.raises(TypeError) as caught:
        flashcore.attention(Q, Q, Q, **{given: True})  # type: ignore[call-overload]
    assert meant in str(caught.value)


def test_packed_sequences_say_how_to_mask() -> None:
    with pytest.raises(TypeError, match=r"keeps them apart.*for each sequence.*seqlens_k"):
        flashcore.attention_varlen(Q[0], Q[0], Q[0], CU, CU, 3, 3, mask=Q)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_do_not_show_it(name: str) -> None:
    parameters = inspect.signature(FUNCTIONS[name][0]).parameters.values()
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters)


def test_compiled_code_is_told_too() -> None:
    compiled = torch.compile(
        lambda q: flashcore.attention(q, q, q, is_causal=True), backend="eager"
    )  # type: ignore[call-overload]
    with pytest.raises(Exception, match="is_causal"):
        compiled(Q)
