"""Copy tensors that kernels cannot read where they are, or read slowly there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashcore.problem import Problem
from flashcore.problem.memory_layout import Strides3, load_bytes, strides_of, with_columns

Tensor = torch.Tensor
Dims = tuple[bool, bool, bool]  # of (batch, heads, seqlen)
PACKET_BYTES = 16
_PACKET = 8  # elements of so many bytes
# Of a call whose mask is copied: with fewer scores, or fewer of them for each element of the mask,
# a copy takes longer than it saves. Of the forward by the bytes of an element.
_MANY_SCORES = 1 << 24
_SCORES_OF_ELEMENT = 2
_SCORES_OF_ELEMENT_FORWARD = {1: 8, 2: 8, 4: 4}


@dataclass(frozen=True, slots=True)
class Copy:
    """A Copy describes a copy of q, k or v, padded with zeros, or of a mask.

    Args:
        name: "q", "k", "v" or "mask".
        columns: from one row of the copy to the next; of q, k and v head_dim or more, all of them
            part of the copy.
        keeps: of (batch, heads, seqlen), where the tensor is expanded and its copy is too.
        sizes: of (batch, heads, seqlen).
        reason: why, in words.
        element_bytes: of an element; 2 of what the kernels take.
    """

    name: str
    columns: int
    keeps: Dims
    sizes: tuple[int, int, int]
    reason: str
    element_bytes: int = 2

    @property
    def strides(self) -> Strides3:
        """Return the strides of the copy, as a Problem has them: 0 where no step is ever taken,
        too."""
        _, heads, rows = self._stored
        steps = (heads * rows * self.columns, rows * self.columns, self.columns)
        of_batch, of_head, of_row = (
            step if size > 1 else 0 for step, size in zip(steps, self._stored, strict=True)
        )
        return of_batch, of_head, of_row

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes that are written, or left as they were behind a mask's
        rows."""
        return math.prod(self._stored) * self.columns * self.element_bytes

    @property
    def _stored(self) -> tuple[int, int, int]:
        batch, heads, rows = (
            1 if kept else size for kept, size in zip(self.keeps, self.sizes, strict=True)
        )
        return batch, heads, rows

    def of(self, x: Tensor) -> Tensor:
        """Make it, of [batch, num_heads, seqlen, head_dim], or of a mask with fewer dimensions."""
        keeps = self.keeps[4 - x.dim() :]
        return with_columns(x, self.columns, keeps, are_zero=self.name != "mask")


def copy_of_mask(problem: Problem, *, forward: bool) -> Copy | None:
    """Return the copy of the mask whose rows begin at multiples of 16 bytes; None where it is not
    worth its time. Kernels for Hopper read such rows faster than others, so it pays where so many
    heads or batches share the mask that the copy takes less: of a backward pass two, of a forward
    pass more, and there only where nothing but the mask hides keys. Measured on an H200
    (2026-11-30): docs/ladder-masks.md, docs/ladder-backward.md. The keys, and not the mask, bind
    calls of one query, whose plans other lengths share (backends/growing.py)."""
    mask = problem.mask
    if mask is None or mask.dtype == "tree" or mask.load_bytes >= PACKET_BYTES:
        return None
    *strides, of_key = mask.strides
    if of_key != 1 or problem.seqlen_q == 1:
        return None
    sizes = problem.batch, problem.num_heads_q, problem.seqlen_q
    keeps = expanded(strides, sizes)
    element_bytes = mask.element_bytes
    if forward and (
        keeps[2]  # one row for all is read but once
        or max(problem.head_dim, problem.head_dim_v) > 128
        or problem.varlen != "none"
        or problem.window_left >= 0
        or problem.window_right >= 0
    ):
        return None
    scores = _SCORES_OF_ELEMENT_FORWARD[element_bytes] if forward else _SCORES_OF_ELEMENT
    packet = PACKET_BYTES // element_bytes
    copy = Copy(
        "mask",
        -(-problem.seqlen_k // packet) * packet,
        keeps,
        sizes,
        f"it is broadcast, and rows that begin at multiples of {PACKET_BYTES} bytes are read "
        f"faster than its own, at multiples of {mask.load_bytes}",
        element_bytes,
    )
    num_scores = math.prod(sizes) * problem.seqlen_k
    own = math.prod(1 if kept else size for size, kept in zip(sizes, keeps, strict=True))
    least = max(_MANY_SCORES, scores * own * problem.seqlen_k)
    return copy if num_scores >= least else None


def expanded(strides: Sequence[int], sizes: Sequence[int]) -> Dims:
    """Return in which of (batch, heads, seqlen) a tensor is expanded."""
    batch, heads, rows = (
        stride == 0 and size > 1 for stride, size in zip(strides, sizes, strict=True)
    )
    return batch, heads, rows


def readable(x: Tensor) -> Tensor:
    """Return x if TMA can read it, or a copy: rows that are contiguous, of whole 16 bytes, at
    multiples of 16 bytes, nothing expanded. Columns of zeros behind it add nothing."""
    x = x.resolve_neg()
    head_dim = x.shape[3]
    if head_dim % _PACKET:
        return with_columns(x, head_dim + -head_dim % _PACKET)
    strides = strides_of(x)
    is_expanded = any(expanded(strides, x.shape[:3]))
    if x.stride(3) != 1 or is_expanded or load_bytes(x) < 16 or max(strides) >= 2**31:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def with_whole_rows(x: Tensor) -> Tensor:
    """Return x, or a copy: batches are a whole number of rows apart, so that a box may end where a
    sequence does (make_ragged in kernels/fwd_sm90/params.py)."""
    batch_stride, _, row_stride = strides_of(x)
    if batch_stride % (row_stride or _PACKET):
        return x.clone(memory_format=torch.contiguous_format)
    return x
