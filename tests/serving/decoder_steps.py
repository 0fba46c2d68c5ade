"""Make steps over a cache of every kind, with new tensors each time, for `attention_with_kvcache`
and for flash-attn's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashcore
from flashcore.compat import flash_attn, flash_attn_3

HALF, INT32 = torch.float16, torch.int32
BATCH, HEADS_Q, HEADS_KV, DIM, PAGE, COLUMNS = 3, 4, 2, 64, 16, 3
ENDS = [0, 1, 2, 9]
of_flash_2, of_flash_3 = flash_attn.flash_attn_with_kvcache, flash_attn_3.flash_attn_with_kvcache


def half(*shape: int) -> Tensor:
    return torch.randn(shape).to(HALF)


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=INT32)


def step_of(name: str) -> dict[str, Any]:
    """Return new tensors of a step, heads first; which ones says its name."""
    parts = name.split(", ")
    q, rows = half(BATCH, HEADS_Q, 1, DIM), BATCH
    given: dict[str, Any] = {"seqlens_k": int32([5, 20, 1])}
    new = half(BATCH, HEADS_KV, 1, DIM), half(BATCH, HEADS_KV, 1, DIM)
    room = PAGE * COLUMNS
    if "several" in parts:
        q = half(BATCH, HEADS_Q, 3, DIM)
    if "packed" in parts:
        q, new = half(9, HEADS_Q, DIM), (half(9, HEADS_KV, DIM), half(9, HEADS_KV, DIM))
        given |= {"cu_seqlens_q": int32(ENDS), "max_seqlen_q": 9}
    if "pages" in parts:
        given["page_table"] = int32([[2, 0, 4], [1, 3, 5], [8, 7, 6]])
        rows, room = BATCH * COLUMNS, PAGE
    if "rows" in parts:
        given["cache_batch_idx"] = int32([4, 0, 2])
        rows = 5
    caches = [half(rows, room, HEADS_KV, DIM).transpose(1, 2) for _ in range(2)]
    if "8 bits" in parts or "8 bits of one scale" in parts:
        caches = [x.to(torch.float8_e4m3fn) for x in caches]
        given["k_scale"] = torch.ones(HEADS_KV)
        given["v_scale"] = given["k_scale"] if "8 bits" not in parts else torch.ones(HEADS_KV)
    if "new" in parts or "rotary" in parts:
        given |= {"k_new": new[0], "v_new": new[1]}
    if "rotary" in parts:
        given |= {"rotary_cos": half(50, 16), "rotary_sin": half(50, 16)}
        given["rotary_interleaved"] = False
    if "sinks" in parts:
        given["sinks"] = torch.randn(HEADS_Q)
    if "out" in parts:
        given["out"] = torch.zeros_like(q)
    if "lse" in parts:
        given["return_lse"] = True
    return {"q": q, "k_cache": caches[0], "v_cache": caches[1], **given}


STEPS = (
    "one piece", "one piece, new", "one piece, rows", "one piece, rows, packed, rotary",
    "one piece, several, rotary", "pages", "pages, several, out", "pages, new", "pages, rotary",
    "pages, rotary, lse", "pages, sinks", "pages, 8 bits, new", "pages, 8 bits of one scale",
    "pages, 8 bits of one scale, sinks, rotary", "pages, packed", "pages, packed, out",
    "pages, packed, rotary, lse",
)  # fmt: skip
OF_2 = {
    "k_new": "k", "v_new": "v", "seqlens_k": "cache_seqlens", "page_table": "block_table",
    "return_lse": "return_softmax_lse",
}  # fmt: skip
OF_3 = OF_2 | {
    "page_table": "page_table",
    "sinks": "s_aux",
    "k_scale": "k_descale",
    "v_scale": "v_descale",
}
NOT_OF_2 = ("sinks", "8 bits", "packed", "out")


def as_flash(given: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return a step as flash-attn's functions take it, tokens before heads."""
    heads_first = "q", "k_cache", "v_cache", "k_new", "v_new", "out"
    found = {
        names.get(name, name): x.transpose(1, 2) if name in heads_first and x.dim() == 4 else x
        for name, x in given.items()
    }
    return {**found, "causal": True}


def plainly(given: dict[str, Any]) -> Any:
    return flashcore.attention_with_kvcache(**given)


def by_2(given: dict[str, Any]) -> Any:
    return of_flash_2(**as_flash(given, OF_2))


def by_3(given: dict[str, Any]) -> Any:
    return of_flash_3(**as_flash(given, OF_3))


CALLS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{name: (plainly, name) for name in STEPS},
    **{f"version 3: {name}": (by_3, name) for name in STEPS},
    **{
        f"version 2: {name}": (by_2, name)
        for name in STEPS
        if not any(word in name for word in NOT_OF_2)
    },
}
