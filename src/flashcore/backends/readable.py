"""Copy tensors that the fused backward cannot read where they are, or reads slowly there."""

from __future__ import annotations

import math

import torch

from flashcore.problem import Problem
from flashcore.problem.memory_layout import load_bytes, strides_of, with_columns_of_zeros

Tensor = torch.Tensor
_PACKET = 8  # elements of 16 bytes
_MANY_SCORES = 1 << 24  # of a call: with fewer a copy of the mask takes longer than it saves


def readable(x: Tensor) -> Tensor:
    """Return x if TMA can read it, or a copy: rows that are contiguous, of whole 16 bytes, at
    multiples of 16 bytes, nothing expanded. Columns of zeros behind it add nothing."""
    x = x.resolve_neg()
    if x.shape[3] % _PACKET:
        return with_columns_of_zeros(x, -x.shape[3] % _PACKET)
    strides = strides_of(x)
    is_expanded = any(
        stride == 0 and size > 1 for stride, size in zip(strides, x.shape[:3], strict=True)
    )
    if x.stride(3) != 1 or is_expanded or load_bytes(x) < 16 or max(strides) >= 2**31:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def copies_mask(problem: Problem, mask: Tensor) -> bool:
    """Return whether a copy of the mask is worth its time. Kernels read rows that begin at
    multiples of 16 bytes in two thirds of the time of others, and a copy is as fast as two heads
    are computed, so it pays where heads or batches share the mask. Measured on an H200
    (2026-11-30), see docs/ladder-backward.md."""
    assert problem.mask is not None
    if problem.mask.load_bytes >= 16 or problem.mask.strides[3] != 1:
        return False
    num_scores = problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k
    own = (size for size, step in zip(mask.shape, mask.stride(), strict=True) if step)
    return num_scores >= max(_MANY_SCORES, 2 * math.prod(own))


def with_aligned_rows(mask: Tensor) -> Tensor:
    """Return a copy, broadcast as the mask is, whose rows begin at multiples of 16 bytes."""
    own = mask[tuple(slice(None if step else 1) for step in mask.stride())]
    keys = own.shape[-1]
    packet = 16 // own.element_size()
    rows = own.new_empty(*own.shape[:-1], -(-keys // packet) * packet)
    return rows[..., :keys].copy_(own).expand(mask.shape)


def with_whole_rows(x: Tensor) -> Tensor:
    """Return x, or a copy: batches are a whole number of rows apart, so that a box may end where a
    sequence does (make_ragged in kernels/fwd_sm90/params.py)."""
    batch_stride, _, row_stride = strides_of(x)
    if batch_stride % (row_stride or _PACKET):
        return x.clone(memory_format=torch.contiguous_format)
    return x
