"""Compute flash-attn's functions over a cache, of versions 2 and 3, by `attention_with_kvcache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore.dropins.alibi import check_slopes
from flashcore.dropins.flash_arguments import renamed, window_of
from flashcore.problem.scales import is_float8
from flashcore.problem.spelling import OF_FLASH_ATTN_CACHE, other_names, refuse
from flashcore.problem.validation import certainly, shape_text, type_name
from flashcore.serving.masks import alibi_over_cache
from flashcore.serving.rotary import Rotary
from flashcore.serving.rows import lengths_after, lengths_of_keys
from flashcore.serving.with_kvcache import Step, with_kvcache

CACHE_NAMES = {
    "seqlens_k": "cache_seqlens", "k_new": "k", "v_new": "v", "rotary_offsets": "rotary_seqlens",
    "cu_seqlens_new": "cu_seqlens_k_new", "scale": "softmax_scale", "window": "window_size",
    "k_scale": "k_descale", "v_scale": "v_descale",
}  # fmt: skip
_PAGES = {
    "k_cache": "k", "v_cache": "v", "scale": "softmax_scale", "window": "window_size",
    "k_scale": "k_descale", "v_scale": "v_descale",
}  # fmt: skip


@other_names(OF_FLASH_ATTN_CACHE)
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    **_unknown: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what flash_attn.flash_attn_with_kvcache does: append k and v to the caches, in place,
    and attend to all that is there.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim].
        k_cache: [batch_cache, seqlen_cache, num_heads_kv, head_dim]; with block_table
            [num_pages, page_size, num_heads_kv, head_dim]. Read and written in place.
        v_cache: likewise, with head_dim_v.
        k: [batch, seqlen_new, num_heads_kv, head_dim], or None: the caches have all.
        v: likewise, with head_dim_v.
        rotary_cos: [positions, rotary_dim / 2]: rotates k at cache_seqlens, cache_seqlens + 1 ...;
            q too with causal or a window, else all of q at cache_seqlens. It needs k.
        rotary_sin: likewise.
        cache_seqlens: int32, [batch], or an int for all: tokens in the cache before the call; by
            default it is full. Out of range, it counts as 0 or as full.
        cache_batch_idx: int32, [batch]: the row of the cache of each sequence.
        cache_leftpad: int32, [batch]: where each sequence begins in its row.
        block_table: int32, [batch, pages of the longest sequence]; pages of any size.
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: query i sees keys up to i + seqlen_k - seqlen_q, by each sequence's own length.
        window_size: (left, right) keys around that one; -1 is unbounded.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        rotary_interleaved: elements 0 and 1, 2 and 3 ... are pairs; False: 0 and rotary_dim / 2 ...
        alibi_slopes: [num_heads_q] or [batch, num_heads_q]; takes a bias of [batch, num_heads_q,
            seqlen_q, seqlen_cache] in float32.
        num_splits: without effect; how keys are split is chosen for each call.
        return_softmax_lse: also return the log-sum-exp of the scores.

    Returns:
        out: [batch, seqlen_q, num_heads_q, head_dim_v], contiguous. With return_softmax_lse the
        pair (out, lse), lse float32 [batch, num_heads_q, seqlen_q]. Neither has a gradient, as in
        flash-attn.

    Raises:
        TypeError, ValueError, NotImplementedError: those of `attention_with_kvcache`.
    """
    if _unknown:
        refuse(flash_attn_with_kvcache, _unknown)
    return attend_without_gradients(
        q, k_cache, v_cache, k, v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved, lengths=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, page_table=block_table,
        scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, return_lse=return_softmax_lse,
        names={**CACHE_NAMES, "page_table": "block_table"},
    )  # fmt: skip


def attend_without_gradients(*arguments: Any, **options: Any) -> Any:
    """Compute `attend_over_cache` unrecorded: flash-attn's function has no backward pass either."""
    with torch.no_grad():
        return attend_over_cache(*arguments, **options)


def rows_as_pages(cu_seqlens_k: Tensor, longest: int) -> Tensor:
    """Return the page table of packed keys whose rows are pages of one token: int32,
    [batch, longest]. Entries behind a sequence's own rows are rows of others, or of none.

    Args:
        cu_seqlens_k: int32, [batch + 1]: where each sequence's rows begin.
        longest: a bound on the keys of a sequence.
    """
    places = torch.arange(longest, dtype=torch.int32, device=cu_seqlens_k.device)
    return cu_seqlens_k[:-1, None] + places


def attend_over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    seqused_k: Tensor,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
    out: Tensor | None = None,
    backend: str = "auto",
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute flash_attn_varlen_func over keys and values in pages, or in rows.

    Args:
        q: [total_q, num_heads_q, head_dim]; without cu_seqlens_q [batch, seqlen_q, num_heads_q,
            head_dim].
        k: [num_pages, page_size, num_heads_kv, head_dim]; without block_table [batch, seqlen_k,
            num_heads_kv, head_dim].
        v: likewise, head_dim_v.
        cu_seqlens_q: int32, [batch + 1].
        max_seqlen_q: the longest sequence of queries, or a bound on it.
        seqused_k: int32, [batch]: keys of each sequence.
        block_table: int32, [batch, pages of the longest sequence].
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: aligned at the lower right, by each sequence's lengths.
        window_size: (left, right), -1 for an unbounded side.
        softcap: bound of the scores; 0.0 is off.
        alibi_slopes: None, or those of padded queries.
        return_lse: whether lse is returned too.
        out: receives the result.
        backend: of `attention`.
        sinks: of `attention`.
        k_scale: of 8-bit keys, [batch, num_heads_kv]; None is 1.
        v_scale: likewise, of values.

    Returns:
        out: as q, with head_dim_v; or (out, lse), lse [num_heads_q, total_q].
    """
    return attend_over_cache(
        q, k, v, None, None, lengths=seqused_k, page_table=block_table, cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q, scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_lse, out=out, backend=backend,
        sinks=sinks, k_scale=k_scale, v_scale=v_scale,
        names={**_PAGES, "seqlens_k": "seqused_k", "page_table": "block_table"},
    )  # fmt: skip


def attend_over_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    lengths: int | Tensor | None,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what the functions above do; tensors have heads next to last. `names` says what the
    caller calls the arguments of `attention_with_kvcache`, in messages. As in flash-attn 3 scales
    have no effect on caches of 16 bits, and are 1 where they are missing."""
    is_packed = cu_seqlens_q is not None
    _check_layout(q, k_cache, v_cache, k, v, is_packed, names)
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
    if isinstance(lengths, int):
        lengths = torch.full((batch,), lengths, dtype=torch.int32, device=q.device)
    mask = None
    if alibi_slopes is not None:
        if is_packed:
            raise NotImplementedError(
                "alibi_slopes is given with packed queries over a cache; pass padded queries"
            )
        check_slopes(alibi_slopes, batch, q.shape[2])
        after = lengths_after(lengths, capacity, 0 if k is None else k.shape[1])
        after = lengths_of_keys(after, capacity, cache_leftpad)
        mask = alibi_over_cache(alibi_slopes, q.shape[1], after, capacity)
    options = {
        "causal": causal, "scale": scale, "window": window, "sinks": sinks,
        "k_scale": _scale_of(k_cache, k_scale), "v_scale": _scale_of(v_cache, v_scale),
        "softcap": None if certainly(softcap == 0.0) else softcap, "batch_invariant": False,
    }  # fmt: skip
    first = q, k_cache, v_cache, k, v, out
    q, k_cache, v_cache, k, v, given = (_heads_first(x) for x in first)  # type: ignore[assignment]
    try:
        step = Step(
            q, k_cache, v_cache, k, v, lengths, page_table, cache_batch_idx, cache_leftpad,
            cu_seqlens_q, cu_seqlens_new, max_seqlen_q, rotary, mask, None, return_lse, given,
            None, backend,
        )  # fmt: skip
        result = with_kvcache(step, options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise renamed(error, names) from None
    found, lse = result if isinstance(result, tuple) else (result, None)
    if out is not None:
        found = out
    elif not is_packed:
        found = found.transpose(1, 2).contiguous()
    return found if lse is None else (found, lse)


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
    is_packed: bool,
    names: dict[str, str],
) -> None:
    """Raise unless ranks and heads fit, as flash-attn lays tensors out."""
    rank, shape = 4, "[batch, seqlen, num_heads, head_dim]"
    if is_packed:
        rank, shape = 3, "[total, num_heads, head_dim], as cu_seqlens_q is given"
    cache = "[batch, seqlen, num_heads_kv, head_dim], or [num_pages, page_size, ...] with a table"
    for name, x, dims, wanted in (
        ("q", q, rank, shape), ("k_cache", k_cache, 4, cache), ("v_cache", v_cache, 4, cache),
        ("k_new", k, rank, shape), ("v_new", v, rank, shape),
    ):  # fmt: skip
        if x is None and name.endswith("new"):
            continue
        name = names.get(name, name)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is a {type_name(x)}")
        if x.dim() != dims:
            raise ValueError(f"{name} has shape {shape_text(x)}; it must be {wanted}")
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
