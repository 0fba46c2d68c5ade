"""List the rows of scripts/sanitize.py: dense forward calls, and calls of all other kernels."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.problem.case import Case
from sanitize_calls import Call, dense, merged, over_cache, over_pages, packed, step

# Small, for racecheck is slow. Each line is there for the code that it makes the kernel enter.
CASES = (
    Case(num_heads_q=1, num_heads_kv=1),  # whole tiles
    Case(seqlen_q=67, seqlen_k=67, head_dim=32, head_dim_v=32),  # ragged tail on both sides
    Case(seqlen_q=1, seqlen_k=1, head_dim=8, head_dim_v=8),  # one row, smallest head
    Case(seqlen_q=1, seqlen_k=190),  # decoding
    Case(num_heads_q=6, seqlen_q=3, seqlen_k=1100, head_dim=32, head_dim_v=32),  # folded, split
    Case(seqlen_q=190, seqlen_k=17),  # fewer keys than a tile
    Case(causal="lower_right", seqlen_q=130, seqlen_k=130),
    Case(causal="lower_right", seqlen_q=150, seqlen_k=50),  # rows with no key at all
    Case(causal="upper_left", seqlen_q=50, seqlen_k=150),
    Case(window=(20, 3), seqlen_q=200, seqlen_k=200),  # tiles skipped at both ends
    Case(softcap=20.0, spread=8.0),
    Case(mask="bool", seqlen_q=70, seqlen_k=90),
    Case(mask="padding", batch=2, seqlen_q=70, seqlen_k=70),
    Case(mask="additive", seqlen_q=70, seqlen_k=90, causal="lower_right"),
    Case(mask="bool", seqlen_q=70, seqlen_k=91),  # mask rows that start anywhere
    Case(mask="additive", seqlen_q=70, seqlen_k=93, causal="lower_right"),
    Case(num_heads_q=4, num_heads_kv=1, seqlen_q=70, seqlen_k=70),
    Case(head_dim=40, head_dim_v=24, seqlen_q=70, seqlen_k=70),  # not multiples of 16
    Case(head_dim=96, head_dim_v=64, seqlen_q=70, seqlen_k=70),
    Case(head_dim=72, head_dim_v=72, seqlen_q=130, seqlen_k=130, causal="lower_right"),
    Case(head_dim=128, head_dim_v=128, seqlen_q=100, seqlen_k=100, causal="lower_right"),
    Case(head_dim=256, head_dim_v=256, seqlen_q=70, seqlen_k=70),
    Case(dtype="bfloat16", seqlen_q=100, seqlen_k=100),
    Case(layout="bshd", seqlen_q=100, seqlen_k=100),  # rows apart in memory
    Case(offset=1, seqlen_q=70, seqlen_k=70),  # addresses that only 2-byte loads may read
    Case(offset=4, head_dim=40, head_dim_v=40, seqlen_q=70, seqlen_k=70),  # 8-byte loads
    Case(tail=5, seqlen_q=70, seqlen_k=70),  # NaN behind every sequence
)

_FORWARD = ("attn_fwd_sm90",)
_PORTABLE: dict[str, Any] = {"kernels": ("attn_fwd_wmma",), "backend": "wmma"}
_TWO = ("attn_bwd_dq_sm90", "attn_bwd_dkdv_sm90")
_ONE = ("attn_bwd_delta_sm90", "attn_bwd_dkdv_sm90", "attn_bwd_round_sm90")
_FLOAT8 = "float8_e4m3fn"

# Dense backward passes; by one kernel, too, where that can.
_GRADIENTS: dict[str, dict[str, Any]] = {
    "full": {"rows": 128, "keys": 128},
    "float16, through lse": {
        "rows": 130,
        "keys": 70,
        "dtype": torch.float16,
        "through_lse": True,
    },
    "causal, grouped heads, odd lengths": {
        "rows": 131,
        "keys": 131,
        "heads": (4, 2),
        "causal": True,
    },
    "causal, head_dim 96": {"rows": 99, "keys": 203, "dim": 96, "causal": True},
    "window, head_dim 128": {"rows": 190, "keys": 190, "dim": 128, "window": (40, 10)},
    "causal, head_dim 128, fewer keys than queries": {  # rows with no key at all
        "rows": 150,
        "keys": 67,
        "dim": 128,
        "causal": True,
    },
    "boolean mask, aligned rows": {"rows": 70, "keys": 144, "mask": "bool"},
    "boolean mask, rows anywhere": {"rows": 70, "keys": 133, "mask": "bool", "dim": 128},
    "additive mask, aligned rows": {"rows": 70, "keys": 144, "mask": "hqk", "heads": (4, 2)},
    "additive mask, rows anywhere": {
        "rows": 70,
        "keys": 133,
        "mask": "qk",
        "dim": 96,
        "causal": True,
    },
}
# Those that two kernels alone compute.
_BY_TWO: dict[str, dict[str, Any]] = {
    "causal, head_dim 256, grouped heads": {
        "rows": 90,
        "keys": 90,
        "heads": (2, 1),
        "dim": 256,
        "causal": True,
    },
    "head_dim 192 and 128": {"rows": 70, "keys": 70, "dim": 192, "dim_v": 128},
    "softcap": {"rows": 70, "keys": 90, "softcap": 5.0},
    "seqlens_k": {"rows": 70, "keys": 150, "batch": 3, "lengths": (131, 0, 64)},
    "seqlens_k, causal, head_dim 128": {
        "rows": 70,
        "keys": 150,
        "batch": 2,
        "lengths": (150, 33),
        "dim": 128,
        "causal": True,
    },
}
_OF_MASKS: dict[str, dict[str, Any]] = {
    "of every pair, aligned rows": {"rows": 70, "keys": 144, "mask": "hqk+grad"},
    "of every pair, rows anywhere": {"rows": 70, "keys": 133, "mask": "hqk+grad", "causal": True},
    "summed over heads and batch": {"rows": 70, "keys": 133, "mask": "qk+grad", "batch": 2},
    "of keys": {"rows": 70, "keys": 133, "mask": "k+grad", "batch": 2, "dim": 128},
}
_PACKED: dict[str, dict[str, Any]] = {
    "packed": {"lengths_q": (67, 1, 0, 130), "lengths_k": (67, 30, 5, 131)},
    "packed, causal, grouped heads, head_dim 128": {
        "lengths_q": (3, 70, 90),
        "lengths_k": (3, 70, 90),
        "heads": (4, 2),
        "dim": 128,
        "causal": True,
    },
    "packed, window": {"lengths_q": (140, 9), "lengths_k": (140, 80), "window": (30, 5)},
}
# Attention over a cache: contiguous, with single tokens and with more.
_CACHES: dict[str, dict[str, Any]] = {
    "contiguous cache": {"lengths": (1, 190, 0, 77), "room": 200},
    "contiguous cache, split keys": {"lengths": (1100, 40), "room": 1200},
    "contiguous cache, a few queries, causal, sinks": {
        "lengths": (131, 5),
        "room": 160,
        "rows": 5,
        "causal": True,
        "with_sinks": True,
    },
}
_PAGES: dict[str, dict[str, Any]] = {
    "pages of 16": {"lengths": (33, 190, 0, 1), "page_size": 16},
    "pages of 16, split keys": {"lengths": (1100, 40), "page_size": 16},
    "pages of 64, head_dim 128": {"lengths": (33, 190, 64), "page_size": 64, "dim": 128},
    "pages of 16, a tree": {
        "lengths": (67, 2, 130),
        "page_size": 16,
        "rows": 5,
        "with_tree": True,
    },
    "packed queries, pages of 16": {
        "lengths": (133, 40, 77, 9),
        "page_size": 16,
        "counts": (70, 1, 1, 1),
    },
    "packed queries, pages of 64, head_dim 128": {
        "lengths": (133, 200, 1),
        "page_size": 64,
        "counts": (1, 90, 1),
        "dim": 128,
    },
    "packed queries, pages of 16, trees": {
        "lengths": (133, 40, 70),
        "page_size": 16,
        "counts": (5, 1, 3),
        "with_tree": True,
    },
}
# The Hopper kernel alone.
_PAGES_SM90: dict[str, dict[str, Any]] = {
    "pages of 16, batch_invariant": {
        "lengths": (1100, 40),
        "page_size": 16,
        "batch_invariant": True,
    },
    "pages of 16, sinks": {"lengths": (300, 0, 40), "page_size": 16, "with_sinks": True},
    "pages of 64, max_score": {
        "lengths": (300, 40),
        "page_size": 64,
        "return_max_score": True,
    },
    "packed queries, pages of 16, batch_invariant, sinks": {
        "lengths": (133, 40),
        "page_size": 16,
        "counts": (20, 1),
        "batch_invariant": True,
        "with_sinks": True,
    },
}
_STEPS: dict[str, dict[str, Any]] = {
    "one token, pages of 16": {"lengths": (0, 11, 63), "page_size": 16},
    "a few tokens, contiguous, pairs of neighbours": {
        "lengths": (30, 62),
        "rows": 4,
        "interleaved": True,
    },
    "packed, a part turns": {
        "lengths": (0, 17, 60),
        "page_size": 16,
        "counts": (20, 1, 1),
        "rotary_dim": 32,
    },
}


def _calls() -> list[Call]:
    """Return the calls that are not dense forward passes: those for Hopper, then others."""
    both = _GRADIENTS
    wide = [*_PAGES.items(), *_PAGES_SM90.items()]
    return [
        *(Call(f"gradients by two, {n}", dense, _TWO, o) for n, o in (both | _BY_TWO).items()),
        *(Call(f"gradients by one, {n}", dense, _ONE, o, by_one=True) for n, o in both.items()),
        Call(
            "gradients by one, a head at a time", dense, _ONE,
            {"rows": 130, "keys": 300, "heads": (4, 2)}, by_one=True, workspace=1,
        ),
        *(
            Call(f"mask gradient {n}", dense, ("attn_bwd_dmask_sm90",), o)
            for n, o in _OF_MASKS.items()
        ),
        *(Call(f"{n}, with gradients", packed, _FORWARD + _TWO, o) for n, o in _PACKED.items()),
        *(Call(n, over_cache, _FORWARD, o) for n, o in _CACHES.items()),
        *(
            Call(f"{n}, 8 bits", over_cache, _FORWARD, o | {"is_8_bit": True})
            for n, o in _CACHES.items()
        ),
        Call(
            "contiguous cache, batch_invariant, max_score", over_cache, _FORWARD,
            {"lengths": (700, 33), "room": 750, "batch_invariant": True, "return_max_score": True},
        ),
        *(Call(n, over_pages, _FORWARD, o) for n, o in wide),
        *(
            Call(f"{n}, 8 bits", over_pages, _FORWARD, o | {"cache": _FLOAT8})
            for n, o in wide
            if "batch_invariant" not in o  # that is the portable kernel's
        ),
        *(Call(f"append {n}", step, ("append_kvcache", *_FORWARD), o) for n, o in _STEPS.items()),
        *(
            Call(f"append {n}, 8 bits", step, ("append_kvcache", *_FORWARD), o | {"is_8_bit": True})
            for n, o in _STEPS.items()
        ),
        *(
            Call(
                f"merge {shape} {str(dtype).removeprefix('torch.')}", merged,
                ("merge_results", "merge_results_backward"), {"shape": shape, "dtype": dtype},
                backend="wmma",
            )
            for shape, dtype in (
                ((2, 3, 33, 64), torch.bfloat16),
                ((1, 2, 5, 40), torch.float16),
                ((3, 17, 128), torch.float32),
            )
        ),
        *(
            Call(f"portable, {n}", packed, options=o | {"backward": False}, **_PORTABLE)
            for n, o in _PACKED.items()
        ),
        *(Call(f"portable, {n}", over_cache, options=o, **_PORTABLE) for n, o in _CACHES.items()),
        *(Call(f"portable, {n}", over_pages, options=o, **_PORTABLE) for n, o in _PAGES.items()),
        Call(
            "portable, pages of 16, 8 bits", over_pages,
            options=_PAGES["pages of 16"] | {"cache": _FLOAT8}, **_PORTABLE,
        ),
    ]  # fmt: skip


# Every road to a kernel that CASES does not take.
CALLS = tuple(_calls())
