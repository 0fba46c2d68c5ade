"""Wrong calls of attention_with_kvcache raise before anything is written, and say how to go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_steps import make_step

import flashcore

INT32 = torch.int32
FUNCTIONS = [flashcore.attention_with_kvcache, flashcore.explain_with_kvcache]


def arguments(page_size: int | None) -> dict[str, Any]:
    return make_step([3, 17], seqlen_q=2, page_size=page_size).arguments()


X = torch.zeros
COS = X(40, 8, dtype=torch.float64)
ROTARY = {"rotary_cos": COS, "rotary_sin": COS, "rotary_interleaved": False}
PACKED = {"q": X(4, 4, 16, dtype=torch.float64), "k_new": X(4, 2, 16, dtype=torch.float64),
          "v_new": X(4, 2, 16, dtype=torch.float64)}  # fmt: skip
ENDS = torch.tensor([0, 2, 4], dtype=INT32)
CACHE = X(2, 2, 32, 16, dtype=torch.float64)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lengths as an int": ({"seqlens_k": 3}, TypeError, r"seqlens_k.*3 \(int\).*torch\.full"),
    "lengths as a list": ({"seqlens_k": [3, 4]}, TypeError, "seqlens_k must be a torch.Tensor"),
    "lengths in int64": ({"seqlens_k": X(2).long()}, TypeError, r"seqlens_k.*int64.*\.int\(\)"),
    "a length too few": ({"seqlens_k": X(1).int()}, ValueError, r"seqlens_k .*\[1\].*2 entries"),
    "a cache of another dtype": (
        {"k_cache": CACHE.half()}, TypeError, r"k_cache has dtype torch.float16 but q has"
    ),
    "a cache of 8 bits": (
        {"v_cache": CACHE.to(torch.float8_e5m2)}, NotImplementedError, "v_cache .*float8.*8 bits"
    ),
    "a cache with heads third": (
        {"k_cache": X(2, 32, 3, 16).double(), "v_cache": X(2, 32, 3, 16).double()},
        ValueError, r"q has 4 heads and k_cache has 32.*k_cache\.transpose\(1, 2\)",
    ),
    "a cache of three dimensions": (
        {"k_cache": CACHE[0]}, ValueError, r"k_cache has 3 dimensions.*transpose"
    ),
    "another head_dim": ({"k_cache": CACHE[..., :8]}, ValueError, "k_cache has head_dim 8 but q"),
    "caches that differ": ({"v_cache": CACHE[:, :, 1:]}, ValueError, r"v_cache has .*k_cache"),
    "another batch": (
        {"k_cache": CACHE[:1], "v_cache": CACHE[:1]}, ValueError, "batch 1 .*cache_batch_idx"
    ),
    "keys without values": ({"v_new": None}, ValueError, "k_new is given without v_new"),
    "values without keys": ({"k_new": None}, ValueError, "v_new is given without k_new"),
    "new keys of another shape": (
        {"k_new": X(2, 4, 2, 16).double()}, ValueError, r"k_new has shape \[2, 4, 2, 16\].*\[2, 2"
    ),
    "new values of another dtype": (
        {"v_new": X(2, 2, 2, 16)}, TypeError, r"v_new has dtype torch.float32.*v_new\.to"
    ),
    "an expanded cache": (
        {"k_cache": CACHE[:1].expand(2, -1, -1, -1)}, ValueError, "k_cache is expanded.*contiguous"
    ),
    "rows that are no int32": (
        {"cache_batch_idx": X(2).long()}, TypeError, r"cache_batch_idx.*int64.*\.int\(\)"
    ),
    "padding of another batch": (
        {"cache_leftpad": X(3).int()}, ValueError, r"cache_leftpad .*\[3\].*2 entries"
    ),
    "packed queries without ends": ({"q": PACKED["q"]}, ValueError, "q has 3 dim.*cu_seqlens_q"),
    "packed queries, padded new ones": (
        {"q": PACKED["q"], "cu_seqlens_q": ENDS}, ValueError, "k_new has 4 dimensions.*packed"
    ),
    "ends in int64": ({**PACKED, "cu_seqlens_q": ENDS.long()}, TypeError, "cu_seqlens_q.*int64"),
    "ends of new ones alone": ({"cu_seqlens_new": ENDS}, ValueError, "cu_seqlens_new .*without"),
    "no ends": ({**PACKED, "cu_seqlens_q": ENDS[:0]}, ValueError, "cu_seqlens_q has shape"),
    "a mask of packed queries": (
        {**PACKED, "cu_seqlens_q": ENDS, "mask": X(2, 1, 2, 32)}, NotImplementedError,
        r"mask \(shape \[2, 1, 2, 32\]\) is given with cu_seqlens_q",
    ),
    "a tree that is no mask": ({"tree_mask": X(2, 2)}, TypeError, "tree_mask has dtype"),
    "a tree of packed queries, no square": (
        {**PACKED, "cu_seqlens_q": ENDS, "tree_mask": X(2, 3).bool()}, ValueError,
        r"tree_mask has shape \[2, 3\]; beside cu_seqlens_q .*\[2, 4, m, m\].*tree_mask\[:, None\]",
    ),
    "trees of other sequences": (
        {**PACKED, "cu_seqlens_q": ENDS, "tree_mask": X(3, 1, 2, 2).bool()}, ValueError,
        r"tree_mask has shape \[3, 1, 2, 2\]",
    ),
    "a tree of numbers, packed": (
        {**PACKED, "cu_seqlens_q": ENDS, "tree_mask": X(2, 2)}, TypeError, "tree_mask has dtype"
    ),
    "a tree of another shape": (
        {"tree_mask": X(2, 2, 2).bool()[:, :, :, None]}, ValueError, r"tree_mask.*\[2, 4, 2, 2\]"
    ),
    "cos without sin": ({**ROTARY, "rotary_sin": None}, ValueError, "rotary_sin is missing"),
    "no word on pairs": (
        {**ROTARY, "rotary_interleaved": None}, TypeError, "rotary_interleaved=None must be True"
    ),
    "cos for each element": (
        {**ROTARY, "rotary_cos": X(40, 16).double(), "rotary_sin": X(40, 16).double()},
        ValueError, r"rotary_cos has shape \[40, 16\].*head_dim 16.*one entry a pair",
    ),
    "cos of another dtype": ({**ROTARY, "rotary_cos": COS.half()}, TypeError, "cos.*float16"),
    "cos of each sequence": ({**ROTARY, "rotary_cos": COS[None]}, ValueError, "rotary_cos has 3"),
    "offsets alone": ({"rotary_offsets": X(2).int()}, ValueError, "without rotary_cos"),
    "offsets and positions": (
        {**ROTARY, "rotary_offsets": X(2).int(), "rotary_positions": X(2, 2).int()}, ValueError,
        "both given",
    ),
    "positions of another shape": (
        {**ROTARY, "rotary_positions": X(2, 3).int()}, ValueError, r"rotary_positions.*\[2, 2\]"
    ),
    "out of another shape": ({"out": X(2, 2, 4, 16).double()}, ValueError, r"out has .*\[2, 4, 2"),
    "out of another dtype": ({"out": X(2, 4, 2, 16)}, TypeError, "out has dtype torch.float32"),
    "lse of another dtype": ({"lse": X(2, 4, 2)}, TypeError, "lse has dtype torch.float32"),
    "a gradient": (
        {"q": X(2, 4, 2, 16, dtype=torch.float64, requires_grad=True)}, NotImplementedError,
        r"no backward pass.*no_grad",
    ),
    "a mask of another shape": ({"mask": X(2, 1, 2, 9)}, ValueError, r"mask has shape"),
    "a mask of another dtype": ({"mask": X(2, 1, 2, 32).half()}, TypeError, "mask has dtype"),
    "sinks of other heads": ({"sinks": X(3)}, ValueError, "sinks has"),
    "causal": ({"causal": "left"}, ValueError, "causal='left'"),
    "window": ({"window": (3, -2)}, ValueError, r"window=\(3, -2\)"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap=-1.0"),
    "scale": ({"scale": 0.0}, ValueError, "scale=0.0"),
    "a backend without its GPU": (
        {"backend": "wmma"}, flashcore.BackendUnavailableError, "wmma"
    ),
    "a bound that is none": (
        {**PACKED, "cu_seqlens_q": ENDS, "max_seqlen_q": "long"}, TypeError, "max_seqlen_q must be"
    ),
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu'"),
    "flash-attn's k": ({"k": 1}, TypeError, r"no argument 'k'.*k_new=\.\.\., v_new="),
    "flash-attn's lengths": ({"cache_seqlens": 1}, TypeError, "seqlens_k=.*without the new"),
    "flash-attn's table": ({"block_table": 1}, TypeError, "page_table="),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", BAD)
def test_the_message_names_argument_value_and_way_out(
    name: str, function: Callable[..., object]
) -> None:
    changes, kind, words = BAD[name]
    given = arguments(None)
    before = given["k_cache"].clone()
    with pytest.raises(kind, match=words):
        function(**given | changes)
    assert torch.equal(given["k_cache"].nan_to_num(), before.nan_to_num())


PAGES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "int64": ({"page_table": X(2, 4).long()}, TypeError, r"page_table.*int64.*\.int\(\)"),
    "a list": ({"page_table": [[1]]}, TypeError, "page_table must be a torch.Tensor"),
    "of another batch": ({"page_table": X(3, 4).int()}, ValueError, r"page_table .*\[3, 4\].*2"),
    "of numbers": ({"page_table": X(2, 4)}, TypeError, r"page_table.*float32.*\.int\(\)"),
    "elsewhere": (
        {"page_table": X(2, 4, dtype=INT32, device="meta")}, ValueError,
        r"page_table is on meta but q is on cpu.*page_table\.to",
    ),
    "of columns": (
        {"page_table": X(4, 2).int().t()}, ValueError, r"page_table has a stride of 2.*contiguous"
    ),
    "with a cache of another dtype": (
        {"k_cache": X(9, 2, 8, 16), "v_cache": X(9, 2, 8, 16)}, TypeError,
        "k_cache has dtype torch.float32 but q has",
    ),
    "with a cache elsewhere": (
        {"v_cache": X(9, 2, 8, 16, dtype=torch.float64, device="meta")}, ValueError, "v_cache is on"
    ),
    "flat": ({"page_table": X(2).int()}, ValueError, r"page_table has shape \[2\]"),
    "with rows": ({"cache_batch_idx": X(2).int()}, ValueError, "both given"),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_table_that_does_not_fit(name: str, function: Callable[..., object]) -> None:
    changes, kind, words = PAGES[name]
    with pytest.raises(kind, match=words):
        function(**arguments(8) | changes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["seqlens_k", "page_table", "k_cache", "v_new"])
def test_tensors_on_another_device(name: str) -> None:
    given = make_step([3, 17], seqlen_q=2, page_size=8, device="cuda").arguments()
    given[name] = given[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on cpu but q is on cuda"):
        flashcore.attention_with_kvcache(**given)


@pytest.mark.parametrize("name", BAD)
def test_a_right_call_before_a_wrong_one_changes_nothing(name: str) -> None:
    """A wrong call is checked although calls like it were: it has another description."""
    changes, kind, words = BAD[name]
    flashcore.attention_with_kvcache(**arguments(None))
    if "rotary_cos" in changes:
        flashcore.attention_with_kvcache(**arguments(None), **ROTARY)
    with pytest.raises(kind, match=words):
        flashcore.attention_with_kvcache(**arguments(None) | changes)


def test_what_was_checked_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.serving import step

    flashcore.attention_with_kvcache(**arguments(8))
    monkeypatch.setattr(step, "check_step", lambda *_: pytest.fail("checked again"))
    flashcore.attention_with_kvcache(**arguments(8))
