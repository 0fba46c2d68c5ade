"""Say how the tensors of a call lie in memory: strides, and the widest loads that all rows
allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.problem.validation import DTYPES, HEAD_DIM_MULTIPLE, tree_size

Strides3 = tuple[int, int, int]
Strides4 = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """A MaskSpec says how a mask is read.

    Args:
        dtype: "bool" (True = attend), or the dtype of an additive mask; "tree": boolean, of the
            last keys of each sequence alone, as many as there are queries.
        strides: elements per step in (batch, head of q, query, key); 0 where broadcast.
        load_bytes: the widest of 16, 8, 4, 2, 1 that divides the address of every row; an element's
            own where those of a row are not neighbours.
        size: rows and columns of a tree; 0 of other masks.
    """

    dtype: str
    strides: Strides4
    load_bytes: int
    size: int = 0

    @property
    def element_bytes(self) -> int:
        """Return the bytes of an element."""
        dtype: torch.dtype = getattr(torch, "bool" if self.dtype == "tree" else self.dtype)
        return dtype.itemsize


def strided_among(**tensors: torch.Tensor) -> str:
    """Return the names of the tensors whose last dimension is not contiguous, joined."""
    return "".join(name for name, x in tensors.items() if x.shape[-1] > 1 and x.stride(-1) != 1)


def misaligned_among(**tensors: torch.Tensor) -> str:
    """Return the names of the tensors with rows that do not start at multiples of 16 bytes,
    joined."""
    return "".join(name for name, x in tensors.items() if load_bytes(x) < 16)


def as_batch(x: torch.Tensor) -> torch.Tensor:
    """Return [total, num_heads, dim] as the [1, num_heads, total, dim] that everything else works
    on."""
    return x.unsqueeze(0).transpose(1, 2)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return [1, num_heads, total, dim] as the [total, num_heads, dim] that `as_batch` takes."""
    return x.squeeze(0).transpose(0, 1)


def strides_of(x: torch.Tensor) -> Strides3:
    """Return strides of (batch, head, seqlen), 0 where no step is ever taken."""
    (b, h, s, _), (sb, sh, ss, _) = x.shape, x.stride()
    return (sb if b > 1 else 0, sh if h > 1 else 0, ss if s > 1 else 0)


def described_memory(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Return the fields of Problem that say how q, k and v lie in memory."""
    tensors = {"q": q, "k": k, "v": v}
    strided = strided_among(**tensors)
    in_place = {
        name: x
        for name, x in tensors.items()
        if x.shape[3] % HEAD_DIM_MULTIPLE == 0 and name not in strided
    }
    width = load_bytes(*in_place.values())
    return {
        "q_strides": strides_of(q),
        "k_strides": strides_of(k),
        "v_strides": strides_of(v),
        "load_bytes": width,
        "strided": strided,
        "misaligned": "" if width == 16 else misaligned_among(**in_place),
    }


def mask_spec(mask: torch.Tensor, is_tree: bool = False) -> MaskSpec:
    """Return how a mask of up to four dimensions is read; one that is a tree is read element by
    element, as only the device knows where its keys begin."""
    missing = (0,) * (4 - mask.dim())
    strides = (
        stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True)
    )
    dtype = "bool" if mask.dtype == torch.bool else DTYPES[mask.dtype]
    of_batch, of_head, of_row, of_key = (*missing, *strides)
    size = mask.element_size()
    if is_tree:
        return MaskSpec("tree", (of_batch, of_head, of_row, of_key), size, tree_size(mask))
    bits = 16 | _address(mask) | (of_batch | of_head | of_row) * size
    return MaskSpec(
        dtype, (of_batch, of_head, of_row, of_key), bits & -bits if of_key == 1 else size
    )


def load_bytes(*tensors: torch.Tensor) -> int:
    """Return widest load, in bytes, that is aligned for every row of the tensors; at most 16.

    Args:
        tensors: [batch, num_heads, seqlen, head_dim] with a contiguous last dimension.

    Returns:
        The lowest set bit of all base addresses, byte strides and row lengths.
    """
    bits = 16
    for x in tensors:
        sb, sh, ss = strides_of(x)
        bits |= _address(x) | (sb | sh | ss | x.shape[3]) * x.element_size()
    return bits & -bits


def _address(x: torch.Tensor) -> int:
    if x.is_meta:
        return 0  # shapes are asked for, whatever the alignment
    try:
        address = x.data_ptr()
        reason = "its address is 0"
    except RuntimeError as error:
        address, reason = 0, str(error)
    if address == 0 and x.numel():
        raise NotImplementedError(
            f"q, k, v or mask (shape {list(x.shape)}) has no memory to read: {reason}. A fake "
            "tensor, or one inside a torch.func transform, can be given to attention, not to what "
            "needs memory"
        )
    return address


def with_columns(
    x: torch.Tensor, columns: int, keeps: Sequence[bool] = (), *, are_zero: bool = True
) -> torch.Tensor:
    """Return a copy of x whose rows begin `columns` elements apart, contiguous but where it is
    expanded. torch's pad would keep the order of dimensions of a tensor that lies channels last,
    whose rows are no rows.

    Args:
        x: with rows along its last dimension.
        columns: as many as x has, or more.
        keeps: of each dimension but the last, where x is expanded and its copy is too; () for
            nowhere.
        are_zero: columns behind those of x are columns of the copy, of zeros; else they are no part
            of it, and hold anything.
    """
    own = x[tuple(slice(1) if kept else slice(None) for kept in keeps)]
    rows = own.new_empty((*own.shape[:-1], columns))
    given, added = rows[..., : x.shape[-1]].copy_(own), rows[..., x.shape[-1] :]
    if not are_zero:
        return given.expand(x.shape)
    if added.shape[-1]:
        added.zero_()
    return rows.expand(*x.shape[:-1], columns)


def with_strides_of_empty_like(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x with the strides of `torch.empty_like(like)`, which compilers are promised: x itself
    where it has them, else a copy. The shapes are equal. Nothing is allocated to learn the
    strides."""
    promised = torch.empty_like(like, device="meta").stride()
    return x if x.stride() == promised else torch.empty_like(like).copy_(x)
