"""Count the operators' floating-point operations, for torch.utils.flop_counter.FlopCounterMode.

Counted as torch counts its own SDPA: two for each product and sum of the matrix products, over all
scores, whatever is masked. The backward pass computes the scores again, and counts them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def _forward(scores: int, q: Tensor, v: Tensor) -> int:
    """Count the scores, over the whole batch and all heads of q."""
    return 2 * scores * (q.shape[-1] + v.shape[-1])


def _backward(scores: int, q: Tensor, v: Tensor) -> int:
    """Count the scores, dq and dk; the weights' gradients and dv."""
    return 2 * scores * (3 * q.shape[-1] + 2 * v.shape[-1])


def _dense_scores(q: Tensor, k: Tensor) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def _packed_scores(
    q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> int:
    """Count scores sequence by sequence; where lengths cannot be read, each counts as the
    longest."""
    lengths = [
        cu_seqlens.diff().tolist()
        if type(cu_seqlens) is Tensor and not cu_seqlens.is_meta
        else [longest] * (cu_seqlens.shape[0] - 1)
        for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k))
    ]
    return q.shape[1] * sum(max(0, n) * max(0, m) for n, m in zip(*lengths, strict=True))


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return _forward(_dense_scores(q, k), q, v)


def _attention_backward(
    dout: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> int:
    return _backward(_dense_scores(q, k), q, v)


def _padded_backward(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> int:
    return _backward(_dense_scores(q, k), q, v)


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **_: Any) -> int:
    return _forward(_packed_scores(q, *arguments[:4]), q, v)


def _varlen_backward(
    dout: Any,
    dlse: Any,
    out: Any,
    lse: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *arguments: Any,
    **_: Any,
) -> int:
    return _backward(_packed_scores(q, *arguments[:4]), q, v)


_FORMULAS = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_padded_forward": _attention_forward,
    "attention_padded_backward": _padded_backward,
    "attention_varlen_forward": _varlen_forward,
    "attention_varlen_backward": _varlen_backward,
}


_registered: dict[Any, Any] = {}


def register(*names: str) -> None:
    """Make the formulas of these operators known, to counters that count already too."""
    for name in names:
        packet = getattr(torch.ops.flashcore, name)
        known_to: Any = flop_counter.register_flop_formula(packet, get_raw=True)
        known_to(_FORMULAS[name])
        _registered[packet] = flop_counter.flop_registry[packet]
    introduce()


def introduce() -> None:
    """Tell the counters around a call: each has the formulas that were known when it was made, and
    flashcore may have been imported later."""
    for mode in _get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if isinstance(known, dict):
            known.update((op, formula) for op, formula in _registered.items() if op not in known)
