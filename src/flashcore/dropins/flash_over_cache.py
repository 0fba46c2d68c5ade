"""Compute what flash-attn's functions over a cache have in common, the long way, and say under
which key their calls are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.dropins.alibi import check_slopes
from flashcore.dropins.flash_arguments import cap_of, check_rows, named, window_of
from flashcore.problem.scales import is_float8
from flashcore.problem.validation import shape_text
from flashcore.serving.arguments import Step
from flashcore.serving.known_steps import Unknown
from flashcore.serving.masks import alibi_over_cache
from flashcore.serving.rotary import Rotary
from flashcore.serving.rows import lengths_after, lengths_of_keys
from flashcore.serving.step import with_kvcache

CACHE_NAMES = {
    "seqlens_k": "cache_seqlens", "k_new": "k", "v_new": "v", "rotary_offsets": "rotary_seqlens",
    "cu_seqlens_new": "cu_seqlens_k_new", "scale": "softmax_scale", "window": "window_size",
    "k_scale": "k_descale", "v_scale": "v_descale",
    "return_lse": "return_softmax_lse", "sinks": "s_aux",
}  # fmt: skip
NAMES_WITH_BLOCKS = CACHE_NAMES | {"page_table": "block_table"}


def key_of(
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    scale: float | None,
    return_lse: bool,
    rotary_interleaved: bool = True,
    *others: object,
) -> object:
    """Return a key of a call's options; a list, which is no key, where they are unusual.

    1 == True == 1.0, and not all of them are valid: types are as usual, or in the key.
    """
    if (
        (causal is True or causal is False)
        and type(window_size) is tuple
        and type(softcap) is float
        and (scale is None or type(scale) is float)
        and (return_lse is True or return_lse is False)
        and (rotary_interleaved is True or rotary_interleaved is False)
    ):
        sides = None if window_size == (-1, -1) else (*window_size, *map(type, window_size))
        return causal, sides, softcap, scale, return_lse, rotary_interleaved, others
    return []


def attend_without_gradients(*arguments: Any, **options: Any) -> Any:
    """Compute `attend_over_cache` unrecorded: flash-attn's function has no backward pass either."""
    with torch.no_grad():
        return attend_over_cache(*arguments, **options)


def attend_over_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    lengths: Any,  # int | Tensor | None
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_lse: bool,
    names: dict[str, str],
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    rotary_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    unknown: Unknown | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what the functions above do; tensors have heads next to last. `names` says what the
    caller calls the arguments of `attention_with_kvcache`, in messages. As in flash-attn 3 scales
    have no effect on caches of 16 bits, and are 1 where they are missing. `unknown` is what
    `attend_known` found out about the call."""
    is_packed = cu_seqlens_q is not None
    _check_layout(q, k_cache, v_cache, k, v, out, is_packed, names)
    window = window_of(window_size)
    rotary = None
    if rotary_cos is not None or rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos is given without k and v; rotate q before the call")
        queries = "first" if not causal and window is None else "begin"
        by: Any = rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens, None, queries
        rotary = Rotary(*by)
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    capacity = k_cache.shape[1]
    if isinstance(page_table, Tensor) and page_table.dim() == 2:
        capacity *= page_table.shape[1]
    if lengths is None:
        if k is not None:
            raise ValueError("cache_seqlens is missing; it says where k and v are to be written")
        lengths = capacity
    if type(lengths) is int:
        lengths = min(max(lengths, 0), capacity)
        lengths = torch.full((batch,), lengths, dtype=torch.int32, device=q.device)
    mask = None
    if alibi_slopes is not None:
        if is_packed:
            raise NotImplementedError(
                "alibi_slopes is given with packed queries over a cache; pass padded queries"
            )
        check_slopes(alibi_slopes, q, batch, q.shape[2])
        after = lengths_after(lengths, capacity, 0 if k is None else k.shape[1])
        after = lengths_of_keys(after, capacity, cache_leftpad)
        mask = alibi_over_cache(alibi_slopes, q.shape[1], after, capacity)
    options = {
        "causal": causal, "scale": scale, "window": window, "sinks": sinks,
        "k_scale": _scale_of(k_cache, k_scale), "v_scale": _scale_of(v_cache, v_scale),
        "softcap": cap_of(softcap), "batch_invariant": False,
    }  # fmt: skip
    first = q, k_cache, v_cache, k, v, out
    q, k_cache, v_cache, k, v, given = (_heads_first(x) for x in first)  # type: ignore[assignment]
    step = Step(
        q, k_cache, v_cache, k, v, lengths, page_table, cache_batch_idx, cache_leftpad,
        cu_seqlens_q, cu_seqlens_new, max_seqlen_q, rotary, mask, None, return_lse, given, None,
        backend,
    )  # fmt: skip
    result = named(names, with_kvcache, step, options, unknown)
    found, lse = result if isinstance(result, tuple) else (result, None)
    if out is not None:
        found = out
    elif not is_packed:
        found = found.transpose(1, 2).contiguous()
    return found if lse is None else (found, lse)


def scales_given(
    cache: Tensor, k_descale: Tensor | None, v_descale: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """Return both descales of a cache of 8 bits; None where there are none, or without effect."""
    if (k_descale is None and v_descale is None) or not is_float8(cache):
        return None
    return k_descale, v_descale


def _scale_of(cache: Tensor, descale: Tensor | None) -> Tensor | None:
    """Return the scale of a cache by what flash-attn 3 calls its descale."""
    if not is_float8(cache):
        return None
    return torch.ones((), device=cache.device) if descale is None else descale


def _heads_first(x: Tensor | None) -> Tensor | None:
    """Return [batch, seqlen, num_heads, dim] with heads before tokens; packed rows as they are."""
    return x if x is None or x.dim() != 4 else x.transpose(1, 2)


def _check_layout(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
    is_packed: bool,
    names: dict[str, str],
) -> None:
    """Raise unless ranks and heads fit, as flash-attn lays tensors out."""
    shape = "[batch, seqlen, num_heads, head_dim]"
    if is_packed:
        shape = "[total, num_heads, head_dim], as cu_seqlens_q is given"
    cache = "[batch, seqlen, num_heads_kv, head_dim], or [num_pages, page_size, ...] with a table"
    for name, x, wanted in (
        ("q", q, shape), ("k_cache", k_cache, cache), ("v_cache", v_cache, cache),
        ("k_new", k, shape), ("v_new", v, shape), ("out", out, shape),
    ):  # fmt: skip
        if x is None and name in ("k_new", "v_new", "out"):
            continue
        check_rows(wanted, **{names.get(name, name): x})
    num_heads_q, num_heads_kv = q.shape[-2], k_cache.shape[2]
    if num_heads_q % num_heads_kv if num_heads_kv else num_heads_q:
        name = names.get("k_cache", "k_cache")
        raise ValueError(
            f"q has {num_heads_q} heads and {name} has {num_heads_kv} (shape "
            f"{shape_text(k_cache)}, heads third); q's must be a multiple of them"
        )
    for name, x, like in (("k_new", k, k_cache), ("v_new", v, v_cache)):
        if x is not None and x.shape[-2:] != like.shape[2:]:
            raise ValueError(
                f"{names.get(name, name)} has shape {shape_text(x)}; its heads and head_dim must "
                f"be those of the cache, {list(like.shape[2:])}"
            )
