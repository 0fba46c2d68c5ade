"""Register flashcore as an attention implementation of HuggingFace Transformers, 4.53 or later.

    from flashcore.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flashcore")

Transformers asks an implementation twice: once per forward for a mask (`attention_mask`), once per
layer for the attention (`attention_forward`). dropins/transformers_masks.py has the kinds of
mask that pass between the two; dropins/own_attention.py says which models have layers that do
not ask.

Sequences packed into one row (padding-free training) come as cu_seq_lens_q, cu_seq_lens_k,
max_length_q and max_length_k besides, and go to `attention_varlen`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from flashcore.api import attention
from flashcore.dropins.packed_rows import (
    PACKED,
    attention_packed,
    packed_lengths,
    same_sequence,
)
from flashcore.dropins.sdpa.attention import scaled_dot_product_attention
from flashcore.dropins.sdpa.obstacles import unserved_layout
from flashcore.dropins.transformers_hooks import answer_for
from flashcore.dropins.transformers_masks import attention_mask, is_all_tokens

__all__ = ["attention_forward", "attention_mask", "register"]

_UNSET: Any = object()
_warned: set[str] = set()


def register(name: str = "flashcore") -> None:
    """Make `attn_implementation=name` known to Transformers; again and again does no harm.

    Args:
        name: what models are to call it.

    Raises:
        ImportError: Transformers is missing, or older than 4.53.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "flashcore.integrations.transformers needs transformers 4.53 or later: "
            'pip install "transformers>=4.53"'
        ) from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
    answer_for(name)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = _UNSET,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer; this is Transformers' attention interface.

    Args:
        module: the layer; says whether it is causal unless is_causal does.
        query: [batch, num_heads_q, seqlen_q, head_dim].
        key: [batch, num_heads_kv, seqlen_k, head_dim].
        value: [batch, num_heads_kv, seqlen_k, head_dim_v].
        attention_mask: from `attention_mask`, or any [batch or 1, num_heads_q or 1, seqlen_q or 1,
            at least seqlen_k], boolean or additive, which then says everything.
        dropout: probability of dropping a weight; other than 0, torch's SDPA computes it, with a
            full mask and a FallbackWarning.
        scaling: multiplies q.k; 1 / sqrt(head_dim) by default.
        is_causal: query i sees keys up to i + seqlen_k - seqlen_q.
        sliding_window: a query sees itself and at most sliding_window - 1 keys before it.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [num_heads_q], a score of each head that takes part in the softmax and has no value
            (an attention sink): the sinks of `attention`.
        sinks: the same for each query, [batch, num_heads_q, seqlen_q, 1]. By lse, behind the call.
        indices: [batch, seqlen_q, any number], the keys that a query may see (sparse attention).
        position_bias: [batch or 1, num_heads_q, seqlen_q, seqlen_k], added to the scores.
        **kwargs: what models pass to every implementation. With cu_seq_lens_q, cu_seq_lens_k
            (int32, [sequences + 1]), max_length_q and max_length_k, batch is 1 and sequences that
            are packed in it do not see each other; with cache (continuous batching) the step's keys
            and values are written into that first. Head masks and block_indices are refused;
            nothing else in it changes the result.

    Returns:
        out: [batch, seqlen_q, num_heads_q, head_dim_v], contiguous; and None for the weights.

    Raises:
        NotImplementedError: a head mask, block_indices, dropout with softcap or sinks, packed
            sequences with what `packed_lengths` lists, or what `attention` does not support.
    """
    has_sinks = s_aux is not None or sinks is not None
    if s_aux is not None:
        sinks = None
        if s_aux.dtype != query.dtype:
            s_aux = s_aux.float()
    causal, window = False, None
    mask = attention_mask
    if mask is not None and is_all_tokens(mask):
        is_causal = mask.dim() == 2
        sliding_window = sliding_window if is_causal else None
        mask = None
    if kwargs.get("cache") is not None:  # continuous batching: its sequences are packed, causal
        key, value = _with_past(module, key, value, kwargs)
        mask = None
    packed = None
    if not _UNUSUAL.isdisjoint(kwargs):
        _refuse(module, kwargs)
        packed = packed_lengths(kwargs, query, mask, dropout, position_bias)
    if packed is not None and mask is not None:
        # A mask that says everything; Transformers' own says this too, where position_ids do.
        mask, packed = _biased(mask[..., : key.shape[2]], same_sequence(packed, query, key)), None
    if mask is None or mask.dim() == 2:
        # Some layers say is_causal=False to whatever has a mask; one of two dimensions is causal.
        causal = mask is not None or bool(
            getattr(module, "is_causal", True) if is_causal is None else is_causal
        )
        window = _window(module, sliding_window, causal)
        mask = None if mask is None else mask[:, None, None, :]
    else:
        if mask.shape[-1] != key.shape[2]:
            mask = mask[..., : key.shape[2]]
        if mask.is_floating_point() and mask.dtype != torch.float32:
            mask = mask.to(query.dtype)
    if indices is not None:
        chosen = _chosen(indices, key.shape[2])
        mask = chosen if mask is None else _biased(mask, chosen)
    if position_bias is not None:
        mask = _biased(position_bias[..., : key.shape[2]].to(query.dtype), mask)
    if dropout and (softcap or has_sinks):
        raise NotImplementedError(
            f"dropout={dropout} together with softcap, s_aux or sinks; set the model's "
            "attention_dropout to 0, or its attn_implementation to 'eager'"
        )
    unread = unserved_layout(query, key, value) and not softcap and not has_sinks
    if dropout or (unread and packed is None):
        mask = _dense(mask, causal, window, query, key)
        out = _by_torch(query, key, value, mask, dropout, scaling)
        return out.transpose(1, 2).contiguous(), None
    if packed is not None:
        result = attention_packed(
            query, key, value, packed, causal=causal, scale=scaling, window=window,
            softcap=softcap or None, sinks=s_aux, return_lse=sinks is not None,
        )  # fmt: skip
    else:
        result = attention(
            query, key, value, causal=causal, scale=scaling, window=window,
            softcap=softcap or None, mask=mask, sinks=s_aux, return_lse=sinks is not None,
        )  # fmt: skip
    if isinstance(result, tuple):
        assert sinks is not None
        out, lse = result
        # exp(lse) is the sum of the softmax; the sink adds exp(sink) to it and nothing to out.
        out = out * torch.sigmoid(lse[..., None] - sinks.to(lse.dtype)).to(out.dtype)
    else:
        out = result
    return out.transpose(1, 2).contiguous(), None


def _with_past(
    module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the keys and values of a step of continuous batching into its cache, and return those
    of all its sequences, packed; their lengths go into kwargs."""
    cache = kwargs.pop("cache")
    kind: Any = type(cache)
    if not _takes_kwargs(kind):
        raise NotImplementedError(
            "continuous batching of this version of Transformers is not supported; update it "
            "(5.23 is), or use generate()"
        )
    layer: Any = module
    past: tuple[torch.Tensor, torch.Tensor] = cache.update(
        key_states=key, value_states=value, layer_idx=layer.layer_idx, kwargs=kwargs
    )
    return past


@functools.cache
def _takes_kwargs(kind: Any) -> bool:
    """Return whether a kind of cache finds what it needs in the keyword arguments of a layer."""
    update = getattr(kind, "update", None)
    return update is not None and "kwargs" in inspect.signature(update).parameters


def _window(module: torch.nn.Module, size: Any, causal: bool) -> tuple[int, int] | None:
    """Return the layer's sliding window as `attention` counts it."""
    if size is _UNSET:  # a model that says it in its config alone
        config: Any = getattr(module, "config", None)
        types = config.layer_types if _has(config, "layer_types") else None
        index: Any = getattr(module, "layer_idx", None)
        slides = types is not None and index is not None and types[index] == "sliding_attention"
        size = config.sliding_window if slides else None
    return None if size is None else (size - 1, 0 if causal else size - 1)


def _has(config: Any, name: str) -> bool:
    """Return whether a config has an attribute; Transformers' take 10 us to say that they have
    not."""
    if config is None or is_dynamo_compiling():  # which resolves it once
        return hasattr(config, name)
    kind = type(config)
    return (
        name in object.__getattribute__(config, "__dict__")
        or hasattr(kind, name)
        or name in getattr(kind, "attribute_map", ())
    )


def _chosen(indices: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """Return [batch, 1, seqlen_q, seqlen_k], True for the keys that are listed for a query."""
    chosen = indices.new_zeros((*indices.shape[:2], seqlen_k), dtype=torch.bool)
    return chosen.scatter(-1, indices.long(), True)[:, None]


def _by_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Compute by the drop-in, with a mask that says everything; it warns where torch computes for a
    kernel."""
    empty = None
    if mask is not None:
        # torch may give NaN for a row with nothing to see, or the mean of the values.
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        empty = hidden.all(-1, keepdim=True)
        mask = mask.masked_fill(empty, True if mask.dtype == torch.bool else 0.0)
    out = scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=True
    )
    return out if empty is None else out.masked_fill(empty, 0.0)


def _biased(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return bias
    if bias.dtype == torch.bool:
        return bias & mask
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -torch.inf)
    return bias + mask


def _dense(
    mask: torch.Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor | None:
    """Return one mask that says everything, for torch."""
    if not causal and window is None:
        return mask
    left, right = window or (-1, 0)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=query.device)
    visible = visible.tril(seqlen_k - seqlen_q + right)
    if left >= 0:
        visible = visible.triu(seqlen_k - seqlen_q - left)
    if mask is None:
        return visible
    return visible & mask if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)


_UNUSUAL = frozenset((*PACKED, "head_mask", "block_indices", "output_attentions"))


def _refuse(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    for name in ("head_mask", "block_indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name} is not supported ({type(module).__name__} passes it); "
                "use attn_implementation='eager'"
            )
    if kwargs.get("output_attentions") and "output_attentions" not in _warned:
        _warned.add("output_attentions")
        warnings.warn(
            "output_attentions: flashcore never has the attention weights; "
            "use attn_implementation='eager'",
            stacklevel=3,
        )
