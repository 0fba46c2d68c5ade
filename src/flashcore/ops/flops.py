"""Count the operators' floating-point operations, for torch.utils.flop_counter.FlopCounterMode.

Counted as torch counts its own SDPA: two for each product and sum of the matrix products, over all
scores, whatever is masked. The backward pass computes the scores again, and counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flashcore.problem.options import Inputs


def forward(scores: int, q: Tensor, v: Tensor) -> int:
    """Return the operations of a forward pass with so many scores over the whole batch and all
    heads of q."""
    return 2 * scores * (q.shape[-1] + v.shape[-1])


def backward(scores: int, q: Tensor, v: Tensor) -> int:
    """Return those of a backward pass: scores, dq and dk; the weights' gradients and dv."""
    return 2 * scores * (3 * q.shape[-1] + 2 * v.shape[-1])


def dense_scores(inputs: Inputs) -> int:
    """Return the number of scores of [batch, num_heads, seqlen, head_dim] tensors."""
    q = inputs.q
    return q.shape[0] * q.shape[1] * q.shape[2] * inputs.k.shape[2]


def paged_scores(inputs: Inputs) -> int:
    """Return the number of scores where each sequence has all keys that its page table reaches."""
    q = inputs.q
    assert inputs.page_table is not None
    return q.shape[0] * q.shape[1] * q.shape[2] * inputs.page_table.shape[1] * inputs.k.shape[2]


def packed_paged_scores(inputs: Inputs) -> int:
    """Return the number of scores where each query has all keys that its page table reaches."""
    q = inputs.q
    assert inputs.page_table is not None
    return q.shape[0] * q.shape[1] * inputs.page_table.shape[1] * inputs.k.shape[2]


def packed_scores(inputs: Inputs) -> int:
    """Return the number of scores sequence by sequence; where lengths cannot be read, each counts
    as the longest."""
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    lengths = [
        cu_seqlens.diff().tolist()
        if type(cu_seqlens) is Tensor and not cu_seqlens.is_meta
        else [longest] * (cu_seqlens.shape[0] - 1)
        for cu_seqlens, longest in (
            (inputs.cu_seqlens_q, inputs.max_seqlen_q),
            (inputs.cu_seqlens_k, inputs.max_seqlen_k),
        )
    ]
    pairs = zip(*lengths, strict=True)
    return inputs.q.shape[1] * sum(max(0, n) * max(0, m) for n, m in pairs)


_registered: dict[Any, Any] = {}


def register(name: str, formula: Callable[..., int]) -> None:
    """Make the formula of an operator known, to counters that count already too.

    Args:
        name: of the operator.
        formula: takes the operator's arguments, returns its operations.
    """
    packet = getattr(torch.ops.flashcore, name)
    known_to: Any = flop_counter.register_flop_formula(packet, get_raw=True)
    known_to(formula)
    _registered[packet] = flop_counter.flop_registry[packet]
    introduce()


def introduce() -> None:
    """Tell the counters around a call: each has the formulas that were known when it was made, and
    flashcore may have been imported later."""
    for mode in _get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if isinstance(known, dict):
            known.update((op, formula) for op, formula in _registered.items() if op not in known)
