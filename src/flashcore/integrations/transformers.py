"""flashcore as an attention implementation of HuggingFace Transformers, 4.53 or later.

    from flashcore.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flashcore")

Transformers asks an implementation twice: once per forward for a mask (`attention_mask`), once per
layer for the attention (`attention_forward`). Three kinds of mask pass between the two:

- None: nothing to hide but what the layer's own causality and sliding window hide;
- [batch, seqlen_k], True = a token: padding, causality and the layer's sliding window;
- [batch, 1, seqlen_q, seqlen_k]: the mask says everything, and the layer adds nothing.

Sequences packed into one row (padding-free training) come as cu_seq_lens_q, cu_seq_lens_k,
max_length_q and max_length_k besides, and go to `attention_varlen`.

The first two are read by the kernels without a tensor of size seqlen_q x seqlen_k. They need the
last query to be aligned with the last key, which static caches, whose keys go on behind it, are
not.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from flashcore.api import attention
from flashcore.packed_rows import attention_packed, packed_lengths, same_sequence
from flashcore.sdpa import scaled_dot_product_attention

__all__ = ["attention_forward", "attention_mask", "register"]

_UNSET: Any = object()
_names: set[str] = set()  # registered
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
    if not _names:
        _be_no_flash_attention()
    _names.add(name)


def _be_no_flash_attention() -> None:
    """Transformers 5 takes every name with "flash" in it for a version of flash-attn, which it then
    wants to import, and to which it denies static caches, other models and other dtypes."""
    from transformers.utils import generic

    theirs = getattr(generic, "is_flash_attention_requested", None)
    if theirs is None:  # Transformers 4 looks for names that begin with "flash_attention"
        return

    def is_flash_attention_requested(
        config: Any = None,
        requested_attention_implementation: str | None = None,
        version: int | list[int] | None = None,
    ) -> bool:
        name = getattr(config, "_attn_implementation", requested_attention_implementation)
        if name in _names:
            return False
        return theirs(config, requested_attention_implementation, version)

    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "transformers" and (
            vars(module).get("is_flash_attention_requested") is theirs
        ):
            module.is_flash_attention_requested = is_flash_attention_requested  # type: ignore[attr-defined]


def attention_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that the layers of one forward share; Transformers' mask interface.

    Args:
        batch_size: number of sequences.
        kv_length: keys per sequence, with those in the cache.
        kv_offset: position of the first of them.
        attention_mask: [batch, positions], True = a token, or None.
        **kwargs: the rest of the interface, which differs between versions: where the queries
            stand (q_length and q_offset, or cache_position), the mask as a function, whether it
            may be left to the layers (allow_is_causal_skip, allow_is_bidirectional_skip).

    Returns:
        None, [batch, kv_length] or [batch, 1, 1 or seqlen_q, kv_length], boolean, with the meaning
        that the module's text gives them.
    """
    tokens = attention_mask
    if tokens is not None:
        missing = kv_offset + kv_length - tokens.shape[-1]
        if missing > 0:  # positions of a static cache that hold no token yet
            tokens = torch.nn.functional.pad(tokens, (0, missing))
        tokens = tokens[:, kv_offset : kv_offset + kv_length].bool()
        # Reading it waits for the GPU, once per forward, and spares every layer a mask.
        if not (torch.compiler.is_compiling() or tokens.is_meta) and bool(tokens.all()):
            tokens = None
    if _is_causal_band(kwargs) and _ends_are_aligned(kv_offset + kv_length, kv_length, kwargs):
        return tokens
    if kwargs.get("allow_is_bidirectional_skip") and kwargs.get("local_size") is None:
        return None if tokens is None else tokens[:, None, None, :]

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )


def _is_causal_band(kwargs: dict[str, Any]) -> bool:
    """Whether the mask is causal, perhaps with the sliding window that layers know themselves."""
    if not kwargs.get("allow_is_causal_skip", True):
        return False  # something is laid over it, or the caller wants it as a tensor
    local_size, config = kwargs.get("local_size"), kwargs.get("config")
    if local_size is None:
        return True
    # Chunks have a local_size too, but layers are told only of windows.
    return (
        getattr(config, "sliding_window", None) == local_size
        and getattr(config, "attention_chunk_size", None) is None
    )


def _ends_are_aligned(kv_end: int, kv_length: int, kwargs: dict[str, Any]) -> bool:
    """Whether the last query stands at the last key."""
    if "q_length" in kwargs:
        q_length, q_offset = kwargs["q_length"], kwargs.get("q_offset", 0)
        if isinstance(q_offset, torch.Tensor):  # a static cache: on the GPU, where we do not look
            return False
        return bool(q_offset + q_length == kv_end)
    positions = kwargs["cache_position"]  # Transformers 4
    if positions.shape[0] == kv_length == kv_end:
        return True
    return not torch.compiler.is_compiling() and int(positions[-1]) + 1 == kv_end


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
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer; Transformers' attention interface.

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
            (an attention sink).
        position_bias: [batch or 1, num_heads_q, seqlen_q, seqlen_k], added to the scores.
        **kwargs: what models pass to every implementation. With cu_seq_lens_q, cu_seq_lens_k
            (int32, [sequences + 1]), max_length_q and max_length_k, batch is 1 and sequences that
            are packed in it do not see each other. Paged caches and head masks are refused;
            nothing else in it changes the result.

    Returns:
        out: [batch, seqlen_q, num_heads_q, head_dim_v], contiguous; and None for the weights.

    Raises:
        NotImplementedError: a paged cache, a head mask, dropout with softcap or s_aux, packed
            sequences with what `packed_lengths` lists, or what `attention` does not support.
    """
    _refuse(kwargs)
    causal, window = False, None
    mask = attention_mask
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
        mask = mask[..., : key.shape[2]]
        if mask.is_floating_point() and mask.dtype != torch.float32:
            mask = mask.to(query.dtype)
    if position_bias is not None:
        mask = _biased(position_bias[..., : key.shape[2]].to(query.dtype), mask)
    if dropout:
        if softcap or s_aux is not None:
            raise NotImplementedError(
                f"dropout={dropout} together with softcap or s_aux; set the model's "
                "attention_dropout to 0, or its attn_implementation to 'eager'"
            )
        mask = _dense(mask, causal, window, query, key)
        out = scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    if packed is not None:
        result = attention_packed(
            query, key, value, packed, causal=causal, scale=scaling, window=window,
            softcap=softcap or None, return_lse=s_aux is not None,
        )  # fmt: skip
    else:
        result = attention(
            query, key, value, causal=causal, scale=scaling, window=window,
            softcap=softcap or None, mask=mask, return_lse=s_aux is not None,
        )  # fmt: skip
    if isinstance(result, tuple):
        assert s_aux is not None
        out, lse = result
        # exp(lse) is the sum of the softmax; the sink adds exp(s_aux) to it and nothing to out.
        out = out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])[..., None].to(out.dtype)
    else:
        out = result
    return out.transpose(1, 2).contiguous(), None


def _window(module: torch.nn.Module, size: Any, causal: bool) -> tuple[int, int] | None:
    """The layer's sliding window as `attention` counts it."""
    if size is _UNSET:  # a model that says it in its config alone
        config: Any = getattr(module, "config", None)
        types = getattr(config, "layer_types", None)
        index: Any = getattr(module, "layer_idx", None)
        slides = types is not None and index is not None and types[index] == "sliding_attention"
        size = config.sliding_window if slides else None
    return None if size is None else (size - 1, 0 if causal else size - 1)


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
    """One mask that says everything, for torch."""
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


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "a paged cache (continuous batching) is not supported; use generate()"
        )
    if kwargs.get("head_mask") is not None:
        raise NotImplementedError("head_mask is not supported; use attn_implementation='eager'")
    if kwargs.get("output_attentions") and "output_attentions" not in _warned:
        _warned.add("output_attentions")
        warnings.warn(
            "output_attentions: flashcore never has the attention weights; "
            "use attn_implementation='eager'",
            stacklevel=3,
        )
