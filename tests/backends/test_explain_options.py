"""Test that what a call takes, the function that explains it takes, too, and says what it changes.

A new option of a call fails here until `explain` has it, and until this file says what it changes
of an explanation, or why it cannot."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import flashcore

HALF, INT32, FLOAT8 = torch.float16, torch.int32, torch.float8_e4m3fn
ADDED = ["arch", "file"]  # by explanations


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=HALF)


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=INT32)


class Pair(NamedTuple):
    """Hold a call, what explains it, and arguments.

    Args:
        call: the public function that computes.
        explain: the public function that explains it.
        usual: arguments of a call.
        changes: for each option, arguments that change what is explained.
        without_effect: options that change nothing of it, and why.
        beside: arguments that an option is compared beside, where it needs some.
    """

    call: Callable[..., Any]
    explain: Callable[..., Any]
    usual: dict[str, Any]
    changes: dict[str, dict[str, Any]]
    without_effect: dict[str, str]
    beside: dict[str, dict[str, Any]]


OF_ALL: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.5},
    "window": {"window": (70, 3)},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": torch.zeros(8)},
    "return_lse": {"return_lse": True},
    "batch_invariant": {"batch_invariant": True},
    "backend": {"backend": "sim"},
}
OF_BOTH = OF_ALL | {
    "causal": {"causal": True},
    "return_max_score": {"return_max_score": True},
    "deterministic": {"deterministic": False},
}
EIGHT_BITS = {"k": half(2, 2, 640, 64).to(FLOAT8), "v": half(2, 2, 640, 64).to(FLOAT8)}
SCALES = {"k_scale": torch.ones(()), "v_scale": torch.ones(())}
PADDED = {**EIGHT_BITS, **SCALES, "seqlens_k": int32(2)}
CACHES = {"k_cache": half(2, 2, 640, 64).to(FLOAT8), "v_cache": half(2, 2, 640, 64).to(FLOAT8)}
NEW = {"k_new": half(2, 2, 4, 64), "v_new": half(2, 2, 4, 64)}
TURNED = {
    **NEW, "rotary_cos": half(9, 16), "rotary_sin": half(9, 16), "rotary_interleaved": False
}  # fmt: skip
PACKED = {"q": half(40, 8, 64), "cu_seqlens_q": int32(3), "max_seqlen_q": 40}
PACKED_NEW = PACKED | {"k_new": half(40, 2, 64), "v_new": half(40, 2, 64)}

PAIRS = {
    "attention": Pair(
        flashcore.attention,
        flashcore.explain,
        {"q": half(2, 8, 512, 64), "k": half(2, 2, 640, 64), "v": half(2, 2, 640, 64)},
        OF_BOTH | {
            "mask": {"mask": half(512, 640)},
            "seqlens_k": {"seqlens_k": int32(2)},
            "k_scale": {"k_scale": torch.ones(2, 2)},
            "v_scale": {"v_scale": torch.ones(2, 2)},
        },
        {},
        {"k_scale": PADDED, "v_scale": PADDED},
    ),
    "attention_varlen": Pair(
        flashcore.attention_varlen,
        flashcore.explain_varlen,
        {
            "q": half(90, 8, 64), "k": half(90, 2, 64), "v": half(90, 2, 64),
            "cu_seqlens_q": int32(4), "cu_seqlens_k": int32(4), "max_seqlen_q": 50,
            "max_seqlen_k": 50,
        },
        OF_BOTH,
        {},
        {},
    ),
    "attention_with_kvcache": Pair(
        flashcore.attention_with_kvcache,
        flashcore.explain_with_kvcache,
        {
            "q": half(2, 8, 4, 64), "k_cache": half(2, 2, 640, 64),
            "v_cache": half(2, 2, 640, 64), "seqlens_k": int32(2),
        },
        OF_ALL | {
            "causal": {"causal": False},
            "k_new": NEW,
            "v_new": NEW,
            "page_table": {"page_table": int32(2, 3)},
            "cache_batch_idx": {"cache_batch_idx": int32(2)},
            "cache_leftpad": {"cache_leftpad": int32(2)},
            "cu_seqlens_q": PACKED,
            "max_seqlen_q": {"max_seqlen_q": 7},
            "rotary_cos": TURNED,
            "rotary_sin": TURNED,
            "rotary_interleaved": {"rotary_interleaved": True},
            "mask": {"mask": half(4, 640)},
            "tree_mask": {"tree_mask": torch.ones(4, 4, dtype=torch.bool)},
            "k_scale": {"k_scale": torch.ones(2, 2)},
            "v_scale": {"v_scale": torch.ones(2, 2)},
            "lse": {"lse": torch.zeros(2, 8, 4)},
        },
        {
            "out": "the kernel is the same, and a result that must lie otherwise is copied",
            "cu_seqlens_new": "the device alone knows where the new tokens of a sequence end",
            "rotary_offsets": "positions are the device's; one kernel takes them all",
            "rotary_positions": "positions are the device's; one kernel takes them all",
        },
        {
            "max_seqlen_q": PACKED, "rotary_cos": NEW, "rotary_sin": NEW,
            "rotary_interleaved": TURNED,
            "k_scale": {**CACHES, **SCALES}, "v_scale": {**CACHES, **SCALES},
            "cu_seqlens_new": PACKED_NEW, "rotary_offsets": TURNED, "rotary_positions": TURNED,
        },
    ),
}  # fmt: skip
UNCHANGED: dict[str, dict[str, Any]] = {
    "out": {"out": half(2, 4, 8, 64).transpose(1, 2)},
    "cu_seqlens_new": {"cu_seqlens_new": int32(3)},
    "rotary_offsets": {"rotary_offsets": int32(2)},
    "rotary_positions": {"rotary_positions": int32(2, 4)},
}


def explained(pair: Pair, **options: Any) -> flashcore.Explanation:
    found = pair.explain(**{"arch": 90, "file": io.StringIO(), **pair.usual, **options})
    assert isinstance(found, flashcore.Explanation)
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_it_takes_what_the_call_takes(name: str) -> None:
    """Names, order, kinds and defaults, so that a call's arguments can be handed on as they are."""
    pair = PAIRS[name]
    of_call, of_explain = (
        [(p.name, p.kind, p.default) for p in inspect.signature(x).parameters.values()]
        for x in (pair.call, pair.explain)
    )
    assert of_explain[: len(of_call)] == of_call
    assert [parameter for parameter, *_ in of_explain[len(of_call) :]] == ADDED


@pytest.mark.parametrize("name", PAIRS)
def test_every_option_is_accounted_for(name: str) -> None:
    pair = PAIRS[name]
    parameters = inspect.signature(pair.call).parameters.values()
    options = {p.name for p in parameters if p.default is not inspect.Parameter.empty}
    assert set(pair.changes) | set(pair.without_effect) == options
    assert not set(pair.changes) & set(pair.without_effect)


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, pair in PAIRS.items() for option in pair.changes]
)
def test_an_option_changes_what_is_explained(name: str, option: str) -> None:
    pair = PAIRS[name]
    beside = pair.beside.get(option, {})
    assert explained(pair, **beside) != explained(pair, **{**beside, **pair.changes[option]})


@pytest.mark.parametrize("option", UNCHANGED)
def test_an_option_without_effect_has_none(option: str) -> None:
    pair = PAIRS["attention_with_kvcache"]
    assert set(UNCHANGED) == set(pair.without_effect)
    beside = pair.beside.get(option, {})
    assert explained(pair, **beside) == explained(pair, **{**beside, **UNCHANGED[option]})
