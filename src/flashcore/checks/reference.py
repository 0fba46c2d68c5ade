"""Define what `attention` means, as plain as it can be written: the float64 oracle.

Everything else is judged by this file, so it takes no part of the implementation: it reads the
arguments as the user wrote them, builds the whole seqlen_q x seqlen_k matrix, and shares no masking
or tiling code with backends/tiled.py or the kernels. Its gradients are autograd's. Read next:
checks/accuracy.py, which turns it into a rule.
"""

from __future__ import annotations

import math

import torch

from flashcore.problem import Causal, Window


def visible_pairs(
    seqlen_q: int,
    seqlen_k: int,
    causal: Causal = False,
    window: Window = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return which key each query may attend to by its position, before any mask.

    Args:
        seqlen_q: number of queries.
        seqlen_k: number of keys.
        causal: False, True (aligned at the lower right) or "upper_left".
        window: (left, right), the keys visible on either side of the diagonal, or None.
        device: where to build the result.

    Returns:
        bool, [seqlen_q, seqlen_k], True where visible.
    """
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)[None, :]
    # The distance of key j from the key that query i is aligned with; positive behind it.
    ahead = j - i if causal == "upper_left" else (j - seqlen_k) - (i - seqlen_q)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if causal is not False:
        visible &= ahead <= 0
    if window is not None:
        left, right = window
        if left >= 0:
            visible &= ahead >= -left
        if right >= 0:
            visible &= ahead <= right
    return visible


def attention_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention in float64 with all scores in memory.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim], any floating dtype and device.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        causal: False, True (aligned at the lower right) or "upper_left".
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        sinks: [num_heads_q], one more score of every row, whose value is 0; or None.

    Returns:
        out: float64, [batch, num_heads_q, seqlen_q, head_dim_v]; 0 for a row without a key.
        lse: float64, [batch, num_heads_q, seqlen_q], natural log; for a row without a key it is
        -inf, or with sinks the sink.
    """
    score = _scores(q, k, causal, scale, window, softcap, mask)
    v64 = v.double().repeat_interleave(_group_size(q, k), dim=1)
    if sinks is not None:
        of_rows = sinks.double()[None, :, None, None].expand(*score.shape[:3], 1)
        score, v64 = torch.cat([score, of_rows], dim=-1), torch.nn.functional.pad(v64, (0, 0, 0, 1))
    empty = torch.all(score == -math.inf, dim=-1)  # also True where there are no keys at all
    # An empty row's scores become 0, for -inf - -inf is NaN, in gradients too.
    score = score.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(score, dim=-1).masked_fill(empty, -math.inf)
    # Not exp(score - lse), whose rounding is an exponent where scores are large.
    weight = torch.softmax(score, dim=-1).masked_fill(empty[..., None], 0.0)
    return weight @ v64, lse


def max_score_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the largest score of each head in float64; the arguments are those of
    `attention_oracle`.

    Returns:
        float64, [batch, num_heads_q]; -inf for a head that sees no key.
    """
    score = _scores(q, k, causal, scale, window, softcap, mask).flatten(2)
    lowest = score.new_full((*score.shape[:2], 1), -math.inf)
    return torch.cat([score, lowest], dim=2).amax(2)


def _group_size(q: torch.Tensor, k: torch.Tensor) -> int:
    return q.shape[1] // k.shape[1] if k.shape[1] else 1


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: Causal,
    scale: float | None,
    window: Window,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return what enters the softmax, float64, [batch, num_heads_q, seqlen_q, seqlen_k]."""
    k64 = k.double().repeat_interleave(_group_size(q, k), dim=1)
    score = q.double() @ k64.transpose(-1, -2)
    score = score * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    visible = visible_pairs(q.shape[2], k.shape[2], causal, window, q.device)
    score = score.masked_fill(~visible, -math.inf)
    if mask is not None:
        if mask.dtype == torch.bool:
            score = score.masked_fill(~mask, -math.inf)
        else:
            score = score + mask.double()
    return score
