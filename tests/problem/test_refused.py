"""Test that a wrong argument of any public function is refused by its own name, with a way out,
before anything is computed: no other library's error, and no result."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashcore
from flashcore.base import env
from flashcore.compat import flash_attn, flash_attn_3

HALF = torch.float16
REFUSED = (TypeError, ValueError, NotImplementedError)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=HALF)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention(**given: Any) -> object:
    q, k, v = randn(2, 4, 8, 16), randn(2, 2, 8, 16), randn(2, 2, 8, 16)
    return flashcore.attention(**{"q": q, "k": k, "v": v} | given)


def varlen(**given: Any) -> object:
    usual = {"q": randn(8, 4, 16), "k": randn(8, 2, 16), "v": randn(8, 2, 16)}
    lengths = {"cu_seqlens_q": int32(0, 8), "cu_seqlens_k": int32(0, 8)}
    longest = {"max_seqlen_q": 8, "max_seqlen_k": 8}
    return flashcore.attention_varlen(**usual | lengths | longest | given)


def with_cache(**given: Any) -> object:
    cache = {"k_cache": randn(2, 2, 9, 16), "v_cache": randn(2, 2, 9, 16)}
    new = {"k_new": randn(2, 2, 1, 16), "v_new": randn(2, 2, 1, 16)}
    usual = {"q": randn(2, 4, 1, 16), "seqlens_k": int32(3, 4)}
    return flashcore.attention_with_kvcache(**cache | new | usual | given)


def explain(**given: Any) -> object:
    x = randn(1, 2, 8, 16)
    return flashcore.explain(x, x, x, **{"file": io.StringIO()} | given)


def prepare(**given: Any) -> object:
    return flashcore.prepare((1, 2, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16), **given)


def merge(**given: Any) -> object:
    out, lse = randn(1, 2, 8, 16), torch.zeros(1, 2, 8)
    return flashcore.merge(**{"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse} | given)


def backward(**given: Any) -> object:
    x, lse = randn(1, 2, 8, 16), torch.zeros(1, 2, 8)
    return flashcore.attention_backward(x, x, x, x, x, lse, **given)


def fa2(**given: Any) -> object:
    q, k, v = randn(2, 8, 4, 16), randn(2, 8, 2, 16), randn(2, 8, 2, 16)
    return flash_attn.flash_attn_func(**{"q": q, "k": k, "v": v} | given)


def fa2_qkv(**given: Any) -> object:
    return flash_attn.flash_attn_qkvpacked_func(**{"qkv": randn(2, 8, 3, 4, 16)} | given)


def fa2_varlen(**given: Any) -> object:
    x, ends = randn(8, 2, 16), int32(0, 8)
    return flash_attn.flash_attn_varlen_func(x, x, x, ends, ends, 8, 8, **given)


def fa2_cache(**given: Any) -> object:
    q, cache = randn(2, 1, 4, 16), randn(2, 9, 2, 16)
    return flash_attn.flash_attn_with_kvcache(q, cache, cache.clone(), **given)


def fa3(**given: Any) -> object:
    x = randn(2, 8, 2, 16)
    return flash_attn_3.flash_attn_func(x, x, x, **given)


def fa3_varlen(**given: Any) -> object:
    x, ends = randn(8, 2, 16), int32(0, 8)
    return flash_attn_3.flash_attn_varlen_func(x, x, x, ends, ends, 8, 8, **given)


def fa3_cache(**given: Any) -> object:
    q, cache = randn(2, 1, 4, 16), randn(2, 9, 2, 16)
    return flash_attn_3.flash_attn_with_kvcache(q, cache, cache.clone(), **given)


SEVERAL = torch.zeros(2, 3)
CASES: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (attention, {"return_max_score": SEVERAL}),
    (varlen, {"k": randn(8, 2, 16).to("meta")}),
    (varlen, {"v": randn(8, 2, 16).to("meta")}),
    (with_cache, {"k_new": "x"}),
    (with_cache, {"k_new": randn(16)}),
    (with_cache, {"seqlens_k": None}),
    (explain, {"arch": 9}),
    (explain, {"arch": "sm_90"}),
    (explain, {"file": "name"}),
    (prepare, {"dtype": "float16"}),
    (prepare, {"device": "x"}),
    (prepare, {"device": -1}),
    (prepare, {"mask": {}}),
    (prepare, {"return_max_score": 1}),
    (merge, {"out_a": randn(1, 2, 8, 16).to(torch.float8_e4m3fn)}),
    (merge, {"out_dtype": torch.float8_e4m3fn}),
    (backward, {"backend": None}),
    (backward, {"backend": "cuda"}),
    *((fa2, {name: value}) for name in "qkv" for value in (None, randn(4))),
    (fa2, {"dropout_p": SEVERAL}),
    (fa2, {"softmax_scale": "x"}),
    (fa2, {"softmax_scale": -1.0}),
    (fa2, {"softcap": SEVERAL}),
    (fa2, {"softcap": -1.0}),
    *((fa2, {"window_size": value}) for value in (None, 5, "ab", (1, 2, 3), ("a", 1), (1.5, 0))),
    (fa2, {"return_attn_probs": 1}),
    (fa2, {"alibi_slopes": 0.5}),
    (fa2, {"alibi_slopes": int32(1, 2, 3, 4)}),
    (fa2, {"alibi_slopes": torch.ones(4, device="meta")}),
    (fa2, {"s_aux": torch.ones(3)}),
    (fa2, {"learnable_sink": torch.ones(3)}),
    (fa2_qkv, {"qkv": None}),
    (fa2_varlen, {"softmax_scale": "x"}),
    (fa2_varlen, {"window_size": 3}),
    (fa2_varlen, {"s_aux": torch.ones(3)}),
    (fa2_varlen, {"alibi_slopes": "x"}),
    (fa2_cache, {"window_size": 3}),
    (fa2_cache, {"softcap": SEVERAL}),
    (fa2_cache, {"cache_seqlens": True}),
    (fa2_cache, {"alibi_slopes": 0.5}),
    (fa2_cache, {"return_softmax_lse": 1}),
    (fa2_cache, {"block_table": "x"}),
    (fa3, {"attention_chunk": SEVERAL}),
    (fa3, {"window_size": (1, 2, 3)}),
    (fa3_varlen, {"window_size": (1, 2, 3)}),
    (fa3_varlen, {"cp_world_size": SEVERAL}),
    (fa3_varlen, {"out": "x"}),
    (fa3_cache, {"out": "x"}),
    (fa3_cache, {"block_table": "x"}),
    (fa3_cache, {"page_table": "x"}),
    (fa3_cache, {"s_aux": torch.ones(3)}),
    (fa3_cache, {"attention_chunk": 1.5}),
]


@pytest.mark.parametrize(
    ("call", "given"),
    CASES,
    ids=[f"{call.__name__}-{'-'.join(given)}-{i}" for i, (call, given) in enumerate(CASES)],
)
def test_the_message_names_the_argument(call: Callable[..., object], given: dict[str, Any]) -> None:
    with pytest.raises(REFUSED) as caught:
        call(**given)
    assert all(name in str(caught.value) for name in given), caught.value


@pytest.mark.parametrize("bound", [10**9, 2**31, 2**70])
def test_any_number_is_a_bound_on_lengths(bound: int) -> None:
    """A bound only helps to choose tiles, and an operator's integers have 64 bits."""
    longest = {"max_seqlen_q": bound, "max_seqlen_k": bound}
    torch.manual_seed(1)
    want = varlen()
    torch.manual_seed(1)
    assert torch.equal(varlen(**longest), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [-5, 10, 2**70])
def test_one_length_of_all_is_clamped(length: int) -> None:
    fa2_cache(cache_seqlens=length)


NESTED = """
import torch, flashcore
x = torch.randn(2, 4, 8, 16)
flashcore.attention(x, x, x)
try:
    flashcore.attention(x, x, torch.nested.nested_tensor([x[0], x[1]]))
except NotImplementedError as error:
    print(error)
"""


def test_a_nested_tensor_does_not_end_the_process() -> None:
    """Torch's guards abort where a tensor has no strides; a call like it must be known before."""
    command = [sys.executable, "-W", "ignore", "-c", NESTED]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-500:]
    assert "v is a nested tensor" in found.stdout


@pytest.mark.parametrize("text", ["90", "sm_90"])
def test_an_architecture_is_named_as_on_the_command_line(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, text)
    assert env.sim_arch() == 90


@pytest.mark.parametrize("text", ["hopper", "sm_", "-90", "9.0", "sm_90a", "7"])
def test_an_architecture_that_is_none_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, text)
    with pytest.raises(ValueError, match=f"{env.SIM_ARCH.name}='{text}' is not an architecture"):
        env.sim_arch()
