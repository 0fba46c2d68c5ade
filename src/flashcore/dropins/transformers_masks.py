"""Make the mask that the layers of one forward share, as flashcore's attention function reads it.

Three kinds of mask pass between the two:

- None: nothing to hide but what the layer's own causality and sliding window hide;
- [batch or 1, seqlen_k], True = a token: padding, causality and the layer's sliding window. One
  element that is expanded means no padding: models get it whose layers may say that they are not
  causal, for some of them say it under causal masks too. The same with four dimensions means that
  nothing is hidden at all, where layers say that they are causal;
- [batch, 1, seqlen_q or 1, seqlen_k]: the mask says everything, and the layer adds nothing. Models
  get no other whose layers read masks themselves, as well as asking for an implementation.

The first two are read by the kernels without a tensor of size seqlen_q x seqlen_k. They need the
last query to be aligned with the last key, which static caches, whose keys go on behind it, are
not.
"""

from __future__ import annotations

from typing import Any

import torch

from flashcore.dropins.transformers_hooks import (
    claims_causality,
    judge_config,
    masks_like,
    may_deny_causality,
)


def attention_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the mask that the layers of one forward share; this is Transformers' mask interface.

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
    config = kwargs.get("config")
    if not torch.compiler.is_compiling():
        judge_config(config)
    theirs = masks_like(config)
    if theirs is not None:
        return _mask_of(theirs, batch_size, kv_length, kv_offset, attention_mask, kwargs)
    tokens = attention_mask
    if tokens is not None:
        missing = kv_offset + kv_length - tokens.shape[-1]
        if missing > 0:  # positions of a static cache that hold no token yet
            tokens = torch.nn.functional.pad(tokens, (0, missing))
        tokens = tokens[:, kv_offset : kv_offset + kv_length].bool()
        tokens = None if _hides_nothing(tokens, kwargs) else _aligned(tokens)
    if _is_causal_band(kwargs) and _ends_are_aligned(kv_offset + kv_length, kv_length, kwargs):
        if tokens is None and may_deny_causality(config):
            return _all_tokens(kv_length, kwargs)
        if tokens is None or kwargs.get("q_length") != 1 or kwargs.get("local_size") is not None:
            return tokens
        return tokens[:, None, None, :]  # to one query causality hides nothing
    if kwargs.get("allow_is_bidirectional_skip") and kwargs.get("local_size") is None:
        if tokens is None and claims_causality(config):
            return _all_tokens(kv_length, kwargs)[None, None]
        return None if tokens is None else tokens[:, None, None, :]
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return _mask_of("sdpa", batch_size, kv_length, kv_offset, attention_mask, kwargs)


def _mask_of(
    implementation: str,
    batch_size: int,
    kv_length: int,
    kv_offset: int,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )
    return mask if mask is None or implementation != "sdpa" else _aligned(mask)


def _hides_nothing(tokens: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether all positions are known to hold tokens.

    Reading that waits for the GPU, once per forward, and spares every layer of a prompt a mask. In
    a decode step a mask costs layers next to nothing, and whoever captures one must not wait.
    """
    if torch.compiler.is_compiling() or kwargs.get("q_length") == 1:
        return False
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return bool(tokens.all())


_ROW_BYTES = 16  # that a kernel reads at once


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """Return the same with rows that start at multiples of 16 bytes: masks of every length are read
    by the same kernel, and fast. Others would be compiled in the middle of a generation."""
    if torch.compiler.is_compiling() or mask.dtype != torch.bool or not mask.is_cuda:
        return mask
    length = mask.shape[-1]
    missing = -length % _ROW_BYTES
    if not missing or mask.numel() == length:  # one row begins where the tensor does
        return mask
    return torch.nn.functional.pad(mask, (0, missing))[..., :length]


def _all_tokens(kv_length: int, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return [1, kv_length] of one element: a causal mask without padding."""
    positions = kwargs.get("cache_position")  # Transformers 4 names no device
    device = kwargs.get("device", "cpu") if positions is None else positions.device
    return torch.ones((), dtype=torch.bool, device=device).expand(1, kv_length)


def is_all_tokens(mask: torch.Tensor | None) -> bool:
    """Return whether a mask of `attention_mask` hides no padding; one of 2 dimensions is causal."""
    if mask is None or mask.dtype != torch.bool or mask.dim() not in (2, 4):
        return False
    return mask.shape[:-1].numel() == 1 and not any(mask.stride())


def _is_causal_band(kwargs: dict[str, Any]) -> bool:
    """Return whether the mask is causal, perhaps with the sliding window that layers know
    themselves."""
    if not kwargs.get("allow_is_causal_skip", True):
        return False  # something is laid over it, or the caller wants it as a tensor
    local_size, config = kwargs.get("local_size"), kwargs.get("config")
    if getattr(config, "num_kv_shared_layers", 0):  # Gemma 4 takes the last rows of a mask of four
        return False
    if local_size is None:
        return True
    # Chunks have a local_size too, but layers are told only of windows.
    return (
        getattr(config, "sliding_window", None) == local_size
        and getattr(config, "attention_chunk_size", None) is None
    )


def _ends_are_aligned(kv_end: int, kv_length: int, kwargs: dict[str, Any]) -> bool:
    """Return whether the last query stands at the last key."""
    if "q_length" in kwargs:
        q_length, q_offset = kwargs["q_length"], kwargs.get("q_offset", 0)
        if isinstance(q_offset, torch.Tensor):  # a static cache: on the GPU, where we do not look
            return False
        return bool(q_offset + q_length == kv_end)
    positions = kwargs["cache_position"]  # Transformers 4
    if positions.shape[0] == kv_length == kv_end:
        return True
    return not torch.compiler.is_compiling() and int(positions[-1]) + 1 == kv_end
