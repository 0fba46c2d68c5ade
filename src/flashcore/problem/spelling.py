"""Recognise keyword arguments as other libraries spell them: an error that says what they are
called here.

A public function ends its parameters with `**_unknown`, which costs a call some 20 ns, hands what
arrives there to `refuse`, and hides it from its signature by `other_names`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def _mean(argument: str) -> str:
    return f"did you mean {argument}?"


_NO_DROPOUT = (
    "there is no dropout of attention weights: leave it out (in evaluation it has no effect), or "
    "call flashcore.scaled_dot_product_attention, which leaves dropout to torch"
)
_BIAS = _mean("mask=..., a boolean tensor (True = attend) or one that is added to the scores")
_CAUSAL = _mean('causal="upper_left", as torch aligns it, or causal=True, at the lower right')
_WINDOW = _mean("window=(left, right)")
_BACKEND = _mean('backend="auto", "sm90", "wmma", "sim" or "torch"')
_LENGTHS = _mean("seqlens_k=..., int32, [batch]")
_LSE = _mean("return_lse=True, which returns (out, lse)")
_PAGES = "flashcore.attention_with_kvcache takes caches in pages, page_table=..."
_PACKED = "flashcore.attention_varlen takes packed sequences"

# By what torch, flash-attn, xformers, JAX and Transformers say: how `attention` says it.
OF_ATTENTION: dict[str, str] = {
    "is_causal": _CAUSAL,
    "causal_mask": _CAUSAL,
    "softmax_scale": _mean("scale=..."),
    "sm_scale": _mean("scale=..."),
    "scaling": _mean("scale=..."),
    "scale_factor": _mean("scale=..."),
    "attn_mask": _BIAS,
    "attention_mask": _BIAS,
    "attn_bias": _BIAS,
    "bias": _BIAS,
    "key_padding_mask": _mean("mask=~key_padding_mask[:, None, None, :], as True is attend here"),
    "alibi_slopes": _mean(
        "mask=-slopes[:, None, None] * distance, in float32, as docs/migration.md has it"
    ),
    "window_size": _WINDOW,
    "sliding_window": _mean("causal=True, window=(sliding_window - 1, 0)"),
    "local_window_size": _WINDOW,
    "left_window": _WINDOW,
    "right_window": _WINDOW,
    "logit_softcap": _mean("softcap=..."),
    "logits_soft_cap": _mean("softcap=..."),
    "logit_cap": _mean("softcap=..."),
    "soft_cap": _mean("softcap=..."),
    "return_attn_probs": _LSE,
    "return_softmax_lse": _LSE,
    "return_max_logit": _mean("return_max_score=True"),
    "need_weights": _LSE,
    "output_attentions": _LSE,
    "s_aux": _mean("sinks=..., [num_heads_q]"),
    "learnable_sink": _mean("sinks=..., [num_heads_q]"),
    "sink": _mean("sinks=..., [num_heads_q]"),
    "enable_gqa": "leave it out, k and v may have fewer heads than q anyway",
    "op": _BACKEND,
    "implementation": _BACKEND,
    "dropout_p": _NO_DROPOUT,
    "dropout": _NO_DROPOUT,
    "p": _NO_DROPOUT,
    "cache_seqlens": _LENGTHS,
    "key_value_seq_lengths": _LENGTHS,
    "seqused_k": _LENGTHS,
    "cu_seqlens_q": _PACKED,
    "cu_seqlens_k": _PACKED,
    "block_table": _PAGES,
    "page_table": _PAGES,
}
_K_NEW = _mean("k_new=..., v_new=...")
OF_KVCACHE: dict[str, str] = {
    **OF_ATTENTION,
    "k": _K_NEW,
    "v": _K_NEW,
    "key": _K_NEW,
    "value": _K_NEW,
    "cache_seqlens": _mean("seqlens_k=..., int32, [batch], without the new tokens"),
    "seqused_k": _mean("seqlens_k=..., int32, [batch]"),
    "block_table": _mean("page_table=..., int32, [batch, pages]"),
    "block_tables": _mean("page_table=..., int32, [batch, pages]"),
    "cu_seqlens_k_new": _mean("cu_seqlens_new=..."),
    "rotary_seqlens": _mean("rotary_offsets=..., int32, [batch]"),
    "custom_mask": _mean("tree_mask=..., boolean, [batch, 1, seqlen_q, seqlen_q]"),
    "deterministic": "leave it out, results are the same bits on every run",
    "num_splits": "leave it out, how keys are split is chosen for each call",
    "scheduler_metadata": "leave it out, nothing is scheduled before a call",
}
_NO_MASK = (
    "packed sequences take no mask and no bias: cu_seqlens keeps them apart, causal and window say "
    "what they see of themselves; for another mask call flashcore.attention for each sequence, or "
    "pad them and pass mask and seqlens_k there (docs/varlen.md)"
)
_MASKS = "mask attn_mask attention_mask attn_bias bias alibi_slopes key_padding_mask"
OF_VARLEN: dict[str, str] = {
    **OF_ATTENTION,
    **dict.fromkeys(_MASKS.split(), _NO_MASK),
    "seqlens_k": _mean("cu_seqlens_k=..., where each sequence ends"),
    "cache_seqlens": _mean("cu_seqlens_k=..., where each sequence ends"),
}
OF_SDPA: dict[str, str] = {
    "causal": _mean(
        "is_causal=True, at the upper left, or flashcore.attention(causal=True), at the lower right"
    ),
    "mask": _mean("attn_mask=..."),
    "attention_mask": _mean("attn_mask=..."),
    "attn_bias": _mean("attn_mask=..."),
    "bias": _mean("attn_mask=..."),
    "softmax_scale": _mean("scale=..."),
    "sm_scale": _mean("scale=..."),
    "scaling": _mean("scale=..."),
    "dropout": _mean("dropout_p=..."),
    "p": _mean("dropout_p=..."),
    "window": "flashcore.attention has window=(left, right)",
    "window_size": "flashcore.attention has window=(left, right)",
    "softcap": "flashcore.attention has softcap",
    "seqlens_k": "flashcore.attention has seqlens_k",
    "return_lse": "flashcore.attention has return_lse",
    "sinks": "flashcore.attention has sinks",
    "backend": "flashcore.attention and flashcore.enable have backend",
}
_PROBS = _mean("return_attn_probs=True, which returns (out, lse, None)")
OF_FLASH_ATTN: dict[str, str] = {
    "is_causal": _mean("causal=True, at the lower right"),
    "scale": _mean("softmax_scale=..."),
    "sm_scale": _mean("softmax_scale=..."),
    "scaling": _mean("softmax_scale=..."),
    "dropout": _mean("dropout_p=0.0"),
    "p": _mean("dropout_p=0.0"),
    "window": _mean("window_size=(left, right)"),
    "sliding_window": _mean("causal=True, window_size=(sliding_window - 1, 0)"),
    "return_lse": _PROBS,
    "sinks": _mean("learnable_sink=..., [num_heads_q]"),
    "return_softmax_lse": _PROBS,
    "mask": "flashcore.attention has a mask",
    "attn_mask": "flashcore.attention has a mask",
    "attn_bias": "flashcore.attention has a mask",
    "seqlens_k": "flashcore.attention has seqlens_k",
    "cache_seqlens": "flashcore.attention has seqlens_k",
    "backend": "flashcore.attention has a backend",
}

_CACHE_LSE = _mean("return_softmax_lse=True, which returns (out, lse)")
OF_FLASH_ATTN_CACHE: dict[str, str] = {
    **OF_FLASH_ATTN,
    **dict.fromkeys(("return_lse", "return_attn_probs"), _CACHE_LSE),
    **dict.fromkeys(("dropout", "dropout_p", "p"), "leave it out, there is no dropout"),
    "k_new": _mean("k=..."),
    "v_new": _mean("v=..."),
    "seqlens_k": _mean("cache_seqlens=..."),
    "seqused_k": _mean("cache_seqlens=..."),
    "page_table": _mean("block_table=..."),
    "mask": "flashcore.attention_with_kvcache has a mask and a tree_mask",
    "out": "flashcore.attention_with_kvcache has out",
    "cu_seqlens_q": "flashcore.compat.flash_attn_3.flash_attn_with_kvcache takes packed queries",
}


def refuse(function: Callable[..., Any], unknown: Iterable[str]) -> NoReturn:
    """Raise the TypeError for keyword arguments that a function does not have.

    Args:
        function: a public one, under `other_names`.
        unknown: what was given, at least one.
    """
    first = next(iter(unknown))
    hint: str | None = function._other_names.get(first)  # type: ignore[attr-defined]
    if hint is None:
        names = list(inspect.signature(function).parameters)
        close = difflib.get_close_matches(first, names, 1)
        hint = _mean(f"{close[0]}=...") if close else f"its arguments are {', '.join(names)}"
    raise TypeError(f"{function.__name__}() has no argument {first!r}: {hint}")


def other_names(known: Mapping[str, str]) -> Callable[[Function], Function]:
    """Hide a function's `**_unknown` from its signature, and keep for `refuse` what others call its
    arguments."""

    def decorated(function: Function) -> Function:
        signature = inspect.signature(function)
        shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        function._other_names = known  # type: ignore[attr-defined]
        return function

    return decorated
