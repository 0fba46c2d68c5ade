"""`attention_with_kvcache` computes one step of a decoder: new keys and values go into a cache, and
queries attend to all of it."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from flashcore.problem import Causal, Window
from flashcore.problem.spelling import OF_KVCACHE, other_names, refuse
from flashcore.serving.arguments import Step, rotary_of
from flashcore.serving.known_steps import Unknown, asked_for, attend_known
from flashcore.serving.step import with_kvcache

__all__ = ["attention_with_kvcache"]


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None = ...,
    v_new: Tensor | None = ...,
    *,
    seqlens_k: Tensor,
    return_lse: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None = ...,
    v_new: Tensor | None = ...,
    *,
    seqlens_k: Tensor,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None = ...,
    v_new: Tensor | None = ...,
    *,
    seqlens_k: Tensor,
    return_lse: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]: ...
@other_names(OF_KVCACHE)
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    *,
    seqlens_k: Tensor,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool | None = None,
    rotary_offsets: Tensor | None = None,
    rotary_positions: Tensor | None = None,
    causal: Causal = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    tree_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
    **_unknown: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache, in place, and compute `attention` over all of it.

    This is one step of a decoder, for sequences of different lengths: one new token each, a few
    (speculation), a prompt or a chunk of one, or all of these packed into one call. Lengths and
    page tables stay on the device: nothing waits for them, so a call can be captured in a CUDA
    graph and replayed with other lengths, and nothing can check them either. Whatever they hold,
    nothing outside of the caches is read or written. There is no backward pass.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim], any strides; with cu_seqlens_q
            [total_q, num_heads_q, head_dim], sequences one after the other.
        k_cache: [batch, num_heads_kv, seqlen_cache, head_dim]; with page_table
            [num_pages, num_heads_kv, page_size, head_dim]. Any strides: of a cache with heads third
            pass `k_cache.transpose(1, 2)`, a view that is read and written in place. dtype and
            device of q, or float8_e4m3fn with scales. num_heads_kv must divide num_heads_q.
        v_cache: likewise, with head_dim_v, which may differ.
        k_new: [batch, num_heads_kv, seqlen_new, head_dim], written behind each sequence's last
            token; with cu_seqlens_q [total_new, num_heads_kv, head_dim]. A token for which there is
            no room, or whose page is none of the cache's, is dropped; a sequence that runs out of
            room counts as full. None: the cache has all keys already.
        v_new: likewise, with head_dim_v.
        seqlens_k: int32, [batch], contiguous, on q's device: the tokens that each sequence has in
            the cache before the call, clamped to 0 and its room. It is not changed: add what was
            appended before the next step. Tokens behind a sequence's end are not read.
        page_table: int32, [batch, pages of the longest sequence]: token t of sequence b is at place
            t % page_size of page page_table[b, t // page_size]. Sequences may share pages that
            nobody writes to. Entries behind a sequence's last page may hold anything.
        cache_batch_idx: int32, [batch]: the row of the cache that each sequence has, where there is
            no page table; by default sequence b has row b.
        cache_leftpad: int32, [batch]: tokens at the beginning of each sequence that do not count
            (padding on the left); seqlens_k includes them. Such caches are copied first.
        cu_seqlens_q: int32, [batch + 1]: 0, then where each sequence of packed queries ends.
        cu_seqlens_new: int32, [batch + 1]: where those of k_new and v_new end; by default
            cu_seqlens_q, as each query's token is new.
        max_seqlen_q: the longest sequence of packed queries, or a bound on it, as
            `attention_varlen` takes it; by default total_q. Where it is exceeded, results are
            unspecified. It helps to choose tiles; see docs/serving-kernels.md.
        rotary_cos: [positions, rotary_dim / 2], dtype of q or float32: rotates the first rotary_dim
            elements of q and of k_new (rotary embedding). Positions beyond its rows count as the
            last.
        rotary_sin: likewise.
        rotary_interleaved: True: elements 0 and 1, 2 and 3 ... are pairs (GPT-J). False: 0 and
            rotary_dim / 2 ... (Llama, GPT-NeoX). It must be given with rotary_cos.
        rotary_offsets: int32, [batch]: the position of each sequence's first new token; by default
            its seqlens_k. The last query is at the position of the last new token.
        rotary_positions: int32, [batch, seqlen_q] or [total_q]: the position of each token, where
            they do not follow each other (a tree of drafts).
        causal: True or "lower_right": the last query sees all keys; see `attention`.
        scale: multiplies q.k; a positive number, by default 1 / sqrt(head_dim).
        window: (left, right), as in `attention`; by each sequence's own length.
        softcap: a positive number c turns each scaled score s into c * tanh(s / c).
        mask: boolean or additive, broadcastable to [batch, num_heads_q, seqlen_q, seqlen_cache], by
            a key's place in its sequence; not with packed queries.
        tree_mask: boolean, broadcastable to [batch, num_heads_q, seqlen_q, seqlen_q]: which of the
            last seqlen_q keys a query sees, besides all before them (speculation with a tree of
            drafts); causal and window hold as well. Kernels read it as it is; beside a `mask` it
            becomes one over the whole cache. With cu_seqlens_q it broadcasts to [batch,
            num_heads_q, m, m] of any m: a sequence of n <= m queries (a single token, too) uses
            rows and columns [0, n) of its own tree, and one of more queries, such as a chunk of a
            prompt, has none.
        sinks: [num_heads_q], float32 or the dtype of q: a logit of each head that joins the
            softmax, as in `attention`.
        k_scale: of a k_cache of float8_e4m3fn, see `attention`; new tokens are divided by it.
        v_scale: likewise, of v_cache.
        return_lse: also return the log-sum-exp of each row of scores.
        out: receives the result: its shape, dtype and device, any strides; by a copy, where it
            does not lie as a kernel writes it.
        lse: receives the log-sum-exp, whether it is returned or not. By a copy.
        batch_invariant: give each sequence the same bits whatever is beside it, as in `attention`;
            packed queries are then never padded. See docs/serving.md.
        backend: "auto", "sm90", "wmma", "sim" or "torch", as in `attention`.

    Returns:
        out: [batch, num_heads_q, seqlen_q, head_dim_v] or [total_q, num_heads_q, head_dim_v], dtype
        of q; the tensor given as `out`, if any. With return_lse, the pair (out, lse): lse is
        natural-log, float32 (float64 for float64 inputs), [batch, num_heads_q, seqlen_q] or
        [num_heads_q, total_q]. A row with nothing to attend to has out 0 and lse -inf, or with
        sinks the sink.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or value.
        NotImplementedError: what `attention` does not support; caches of other 8-bit floats; a mask
            with packed queries; tensors that require a gradient while gradients are recorded.
        BackendUnavailableError: as `attention`.

    Numerics:
        As `attention`. Rotations are computed in float32 (float64) and rounded once.

    Source:
        FlashAttention-2, arXiv:2307.08691; pages: PagedAttention, arXiv:2309.06180; rotary
        embedding: RoFormer, arXiv:2104.09864.
    """
    if _unknown:
        refuse(attention_with_kvcache, _unknown)
    unknown = None
    if (
        mask is None
        and tree_mask is None
        and cache_leftpad is None
        and cu_seqlens_new is None
        and rotary_offsets is None
        and rotary_positions is None
        and lse is None
        and (batch_invariant is False or batch_invariant is True)
        and (max_seqlen_q is None or type(max_seqlen_q) is int)
        and (rotary_cos is None or rotary_interleaved is False or rotary_interleaved is True)
    ):
        known = attend_known(
            q, k_cache, v_cache, seqlens_k, page_table, cache_batch_idx, cu_seqlens_q,
            None if k_new is None and v_new is None else (k_new, v_new),
            None if rotary_cos is None and rotary_sin is None else (rotary_cos, rotary_sin),
            sinks, None if k_scale is None and v_scale is None else (k_scale, v_scale), out,
            (
                causal if (
                    (causal is True or causal is False) and window is None and softcap is None
                    and scale is None and return_lse is False
                ) else asked_for(causal, window, softcap, scale, return_lse),
                batch_invariant, backend, max_seqlen_q, rotary_interleaved,
            ),
            False,
        )  # fmt: skip
        if isinstance(known, Unknown):
            unknown = known
        elif known is not None:
            return known
    rotary = rotary_of(rotary_cos, rotary_sin, rotary_interleaved, rotary_offsets, rotary_positions)
    step = Step(
        q, k_cache, v_cache, k_new, v_new, seqlens_k, page_table, cache_batch_idx, cache_leftpad,
        cu_seqlens_q, cu_seqlens_new, max_seqlen_q, rotary, mask, tree_mask, return_lse, out, lse,
        backend,
    )  # fmt: skip
    return with_kvcache(
        step,
        {
            "causal": causal, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks,
            "k_scale": k_scale, "v_scale": v_scale, "batch_invariant": batch_invariant,
        },
        unknown,
    )  # fmt: skip
