"""Describe caches of 8 bits: keys and values whose elements, float8_e4m3fn, count times a scale of
their sequence and head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcore.problem.validation import check_plain_tensor, is_number, may_broadcast, shape_text

if TYPE_CHECKING:
    from flashcore.problem.memory_layout import Strides4
    from flashcore.problem.options import Inputs

CACHE_DTYPES = {torch.float8_e4m3fn: "float8_e4m3fn"}
LARGEST = 448.0  # of the elements
# A scale below this counts as this, as in kernels/tile/sequence.cuh and append/quantise.cuh: one of
# 0 divides and multiplies, too.
SMALLEST_SCALE = 1e-30
OTHER_FLOAT8 = frozenset(
    getattr(torch, name) for name in dir(torch) if name.startswith("float8_")
) - set(CACHE_DTYPES)


def is_float8(x: object) -> bool:
    """Return whether x is a tensor of 8-bit floats that kernels read."""
    return isinstance(x, Tensor) and x.dtype in CACHE_DTYPES


def check_scales(
    k: Tensor,
    v: Tensor,
    k_scale: object,
    v_scale: object,
    batch: int,
    names: tuple[str, str] = ("k", "v"),
) -> None:
    """Raise unless keys and values are both of 8 bits, with scales, or neither is, without.

    Args:
        k: of a cache, [..., num_heads_kv, length, head_dim].
        v: likewise.
        k_scale: float32, broadcastable to [batch, num_heads_kv].
        v_scale: likewise.
        batch: sequences.
        names: what the caller calls k and v.
    """
    of_k, of_v = names
    if is_float8(k) != is_float8(v):
        raise TypeError(
            f"{of_k} has dtype {k.dtype} but {of_v} has {v.dtype}; both are float8_e4m3fn, or both "
            "have the dtype of q"
        )
    for name, x, scale in ((of_k, k, k_scale), (of_v, v, v_scale)):
        _check_scale(f"{name[0]}_scale", scale, name, x, batch)


def _check_scale(name: str, scale: object, of: str, x: Tensor, batch: int) -> None:
    if not is_float8(x):
        if scale is not None:
            raise ValueError(
                f"{name} is given, but {of} has dtype {x.dtype}; scales belong to float8_e4m3fn: "
                f"pass {name}=None"
            )
        return
    if scale is None:
        raise ValueError(
            f"{name} is missing; {of} has dtype {x.dtype}, whose values count times a scale: pass "
            f"float32 of shape [], [num_heads_kv] or [batch, num_heads_kv], or where they count as "
            f"they are, {name}=torch.ones((), device={of}.device)"
        )
    if is_number(scale):
        raise TypeError(
            f"{name} must be a torch.Tensor, but is {scale!r}; pass torch.tensor({scale!r}, "
            f"device={of}.device)"
        )
    if not torch.compiler.is_compiling():
        check_plain_tensor(name, scale)
    assert isinstance(scale, Tensor)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {scale.dtype}; it must be float32: pass {name}.float()")
    if scale.device != x.device:
        raise ValueError(
            f"{name} is on {scale.device} but {of} is on {x.device}; move it with "
            f"{name}.to({of}.device)"
        )
    target = (batch, x.shape[1])
    if not may_broadcast(scale.shape, target):
        raise ValueError(
            f"{name} has shape {shape_text(scale)}; it must be [], [num_heads_kv] or "
            f"[batch, num_heads_kv] = {list(target)}"
        )


def check_scales_of(inputs: Inputs) -> None:
    """Raise unless k and v have scales where they are of 8 bits, and none where they are not."""
    q, k, v, *_ = inputs
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_plain_tensor(name, x)
    if k.dim() == v.dim() == 4:  # or more is wrong
        check_scales(k, v, inputs.k_scale, inputs.v_scale, q.shape[0])


def scales_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return the scales of a call by the names that kernels know them by; none of a call whose keys
    have the dtype of q."""
    if inputs.k_scale is None or inputs.v_scale is None:
        return {}
    return {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}


def scale_strides(scale: Tensor | None) -> tuple[int, int]:
    """Return the strides of a scale from sequence to sequence and from head to head, in elements: 0
    where all share one, and of None."""
    if scale is None:
        return 0, 0
    steps = [step if n > 1 else 0 for n, step in zip(scale.shape, scale.stride(), strict=True)]
    of_sequence, of_head = [0] * (2 - len(steps)) + steps
    return of_sequence, of_head


def described_scales(inputs: Inputs) -> dict[str, Any]:
    """Return the fields of Problem that say how 8-bit caches are read."""
    if not scales_of(inputs):
        return {}
    of_k, of_v = scale_strides(inputs.k_scale), scale_strides(inputs.v_scale)
    found: Strides4 = (*of_k, *of_v)
    return {"cache_dtype": CACHE_DTYPES[inputs.k.dtype], "scale_strides": found}


def check_has_lengths(inputs: Inputs) -> None:
    """Raise where a call of `attention` has scales and no seqlens_k."""
    has_scales = inputs.k_scale is not None or inputs.v_scale is not None
    if has_scales and inputs.seqlens_k is None:
        raise ValueError(
            "k_scale or v_scale is given without seqlens_k, with which caches of 8 bits come; if "
            "all keys count pass torch.full((batch,), seqlen_k, dtype=torch.int32, device=q.device)"
        )


def as_wide(inputs: Inputs) -> Inputs:
    """Return the inputs with stand-ins of q's dtype for 8-bit caches, for checks of shapes and
    devices; their memory is nobody's."""
    if not is_float8(inputs.k):
        return inputs
    k, v = (x.new_empty(1, dtype=inputs.q.dtype).expand(x.shape) for x in (inputs.k, inputs.v))
    return inputs._replace(k=k, v=v, k_scale=None, v_scale=None)


def dequantised(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the values of keys or values [batch, num_heads_kv, length, dim] of 8 bits; others as
    they are.

    Args:
        x: keys or values.
        scale: broadcastable to [batch, num_heads_kv]; None: x is as it is.
        dtype: of the result.
    """
    if scale is None:
        return x
    return (x.to(torch.float32) * scale[..., None, None]).to(dtype)


def dequantised_rows(
    x: Tensor, scale: Tensor | None, sequence: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the values of rows of 8 bits, rounded to a dtype; others as they are.

    Args:
        x: [rows, num_heads_kv, dim].
        scale: broadcastable to [batch, num_heads_kv]; None: x is as it is.
        sequence: int64, [rows]: the sequence of each row; read only where there is a scale.
        dtype: of the result.
    """
    if scale is None:
        return x
    if scale.dim() == 2 and scale.shape[0] > 1:
        scale = scale[sequence]
    return (x.to(torch.float32) * scale[..., None]).to(dtype)


def dequantised_inputs(inputs: Inputs) -> Inputs:
    """Return the call with the values of 8-bit caches in the dtype of q, rounded to it."""
    k = dequantised(inputs.k, inputs.k_scale, inputs.q.dtype)
    v = dequantised(inputs.v, inputs.v_scale, inputs.q.dtype)
    return inputs._replace(k=k, v=v, k_scale=None, v_scale=None)


def quantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return elements of 8 bits that count as x does, times a scale that broadcasts; what is too
    large becomes the largest."""
    elements = x.to(torch.float32) / scale.clamp(min=SMALLEST_SCALE)
    return elements.clamp(-LARGEST, LARGEST).to(dtype)


def part_of_scale(scale: Tensor | None, b: slice) -> Tensor | None:
    """Return a sequence's part of a scale that broadcasts to [batch, num_heads_kv]."""
    return scale if scale is None or scale.dim() < 2 or scale.shape[0] == 1 else scale[b]
