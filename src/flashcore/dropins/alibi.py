"""Turn flash-attn's alibi_slopes into additive masks: of a padded batch, and of packed
sequences."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch

from flashcore.api import attention
from flashcore.backends.packed import check_packed
from flashcore.backends.sinks import lse_of_no_keys
from flashcore.errors import FallbackWarning, stacklevel_of_caller
from flashcore.ops.dense import autocast
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.validation import check_device
from flashcore.serving.checking import check_plain

Tensor = torch.Tensor

_warned: set[str] = set()


def check_slopes(slopes: object, q: Tensor, batch: int, num_heads: int) -> None:
    """Raise unless there is a slope for each head of q, of each sequence or of all, beside q."""
    check_plain("alibi_slopes", slopes)
    assert isinstance(slopes, Tensor)
    if not slopes.is_floating_point():
        raise TypeError(
            f"alibi_slopes has dtype {slopes.dtype}; it must be float32: pass alibi_slopes.float()"
        )
    if slopes.shape not in ((num_heads,), (batch, num_heads)):
        raise ValueError(
            f"alibi_slopes has shape {list(slopes.shape)}; it must be [num_heads_q] = "
            f"[{num_heads}] or [batch, num_heads_q] = [{batch}, {num_heads}]"
        )
    check_device("alibi_slopes", slopes, q)


def alibi_mask(slopes: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """Return the bias -slope * abs(i + seqlen_k - seqlen_q - j) of query i and key j.

    Args:
        slopes: [num_heads] or [batch, num_heads], on the device of the scores.
        seqlen_q: queries.
        seqlen_k: keys.

    Returns:
        [batch or 1, num_heads, seqlen_q, seqlen_k], float32.
    """
    i = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=slopes.device, dtype=torch.float32)
    j = torch.arange(seqlen_k, device=slopes.device, dtype=torch.float32)
    distance = (i[:, None] - j).abs()
    return -slopes.float().reshape(-1, slopes.shape[-1], 1, 1) * distance


def packed_with_alibi(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    slopes: Tensor,
    *,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute `attention_varlen` with a bias by a call of `attention` for each sequence. The host
    reads the lengths for that, and so waits for them.

    Args:
        q: [total_q, num_heads_q, head_dim].
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32, [batch + 1].
        cu_seqlens_k: int32, [batch + 1].
        slopes: [num_heads_q] or [batch, num_heads_q].
        sinks: of `attention`, or None.
        options: of `attention`: causal, scale, window, softcap.

    Returns:
        out: [total_q, num_heads_q, head_dim_v], dtype of q; 0 in rows of no sequence.
        lse: [num_heads_q, total_q]; -inf there, or the sink.

    Raises:
        Exception: what `attention_varlen` and `attention` raise; see `check_slopes` too.
    """
    q, k, v, _, sinks = autocast(q, k, v, None, sinks)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    total_q, num_heads, _ = q.shape
    check_slopes(slopes, q, cu_seqlens_q.shape[0] - 1, num_heads)
    _warn_once()
    out = q.new_zeros((total_q, num_heads, v.shape[2]))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = lse_of_no_keys(q.new_empty((num_heads, total_q), dtype=lse_dtype), sinks)
    pairs = zip(_rows(cu_seqlens_q, total_q), _rows(cu_seqlens_k, k.shape[0]), strict=True)
    for b, (queries, keys) in enumerate(pairs):
        if queries.start >= queries.stop or keys.start >= keys.stop:
            continue
        own_out, own_lse = attention(
            as_batch(q[queries]),
            as_batch(k[keys]),
            as_batch(v[keys]),
            mask=alibi_mask(
                slopes if slopes.dim() == 1 else slopes[b],
                queries.stop - queries.start,
                keys.stop - keys.start,
            ),
            sinks=sinks,
            return_lse=True,
            **options,
        )
        out[queries] = own_out[0].transpose(0, 1)
        lse[:, queries] = own_lse[0]
    return out, lse


def _rows(cu_seqlens: Tensor, total: int) -> list[slice]:
    """Return the rows of each sequence, clamped as the kernels do (tile/sequence.cuh)."""
    ends = [min(max(0, end), total) for end in cu_seqlens.tolist()]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _warn_once() -> None:
    reason = "alibi_slopes with packed sequences"
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"{reason}: no kernel serves them together, so each sequence is a call of its own, with a "
        "bias in memory, and the host waits for the lengths; filter flashcore.FallbackWarning to "
        "silence this",
        FallbackWarning,
        stacklevel=stacklevel_of_caller(),
    )
