"""A Case is one attention call written down in numbers, and the tensors made from it.

verify draws cases, isolate and bench take them from the command line, and tests write them out.
A case and its seed always make the same tensors, on every machine (torch's CPU generator).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcore.problem.case import Case

CAUSAL_KINDS = ("none", "upper_left", "lower_right")
MASK_KINDS = ("none", "bool", "triangle", "padding", "additive")
LAYOUTS = ("bhsd", "bshd")
# Nats that are added to a key's score, by the number of its step; steps are counted from the last
# key on, and what falls in this order rises in the other. A softmax that rescales must follow.
_GROWTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "slow": lambda step: step * 4.2,  # 2^6 a step
    "fast": lambda step: step * 21.0,  # 2^30
    "far": lambda step: step * 200.0,  # past float32
    "falling": lambda step: step * -40.0,
    "zigzag": lambda step: (step ^ 1) * 21.0,  # the second half of a key tile above the first one
}
# And on one key that some rows see so.
_PEAKS = {"peak": 30.0, "far peak": 120.0}
# And on all keys alike, "level": so much that its product with a scale is off by up to 1/2 in log2
# units when float32 rounds it. Not drawn, as float16 has no such k.
_LEVEL = 8.0e6
DRAWN_GROWTHS = ("none", *_GROWTHS, *_PEAKS)
GROWTH_KINDS = (*DRAWN_GROWTHS, "level")
_GROWTH_STEP = 32  # keys, or more, for 16 steps at most


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs are the tensors of a case: q, k, v [batch, num_heads, seqlen, head_dim], the mask or
    None, and sinks [num_heads_q] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None = None

    @property
    def others(self) -> dict[str, Tensor]:
        """Return what a kernel is given besides, by name."""
        return {} if self.sinks is None else {"sinks": self.sinks}


def make_inputs(case: Case, device: str | torch.device = "cpu") -> Inputs:
    """Make the tensors of a case.

    Args:
        case: what to make.
        device: where the tensors go; the values do not depend on it.

    Returns:
        q, k, v with the strides, offset and NaN tail that the case asks for, the mask and sinks.
    """
    generator = torch.Generator().manual_seed(case.seed)
    dtype = case.torch_dtype

    def normal(heads: int, seqlen: int, dim: int) -> Tensor:
        return torch.randn(case.batch, heads, seqlen, dim, generator=generator)

    q = normal(case.num_heads_q, case.seqlen_q, case.head_dim) * case.spread
    k = normal(case.num_heads_kv, case.seqlen_k, case.head_dim)
    v = normal(case.num_heads_kv, case.seqlen_k, case.head_dim_v)
    if case.growth != "none":
        _grow(q, k, case)
    mask = _make_mask(case, generator)
    q, k, v = (_place(values.to(dtype), case, device) for values in (q, k, v))
    if mask is not None:
        if case.seed % 2:
            mask = _with_rows_apart(mask, case.seqlen_k // 16 * 16 + 16)
        elif case.seed % 4:
            mask = _with_rows_apart(mask, case.seqlen_k // 2 * 2 + 3)
        mask = mask.to(device)
    # Some above and some below what rows of scores add up to, log(seqlen_k) and a little.
    sinks = None
    if case.sinks:
        sinks = torch.randn(case.num_heads_q, generator=generator) * 4.0 + 3.0
        sinks = sinks.to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)
    return Inputs(q, k, v, mask, sinks)


def _grow(q: Tensor, k: Tensor, case: Case) -> None:
    """Add the case's growth to the scores: the first column of q and of k holds it."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    rows, keys = torch.arange(case.seqlen_q), torch.arange(case.seqlen_k).flip(0)
    if case.growth in _GROWTHS:
        step = keys // max(_GROWTH_STEP, -(-case.seqlen_k // 16))
        of_rows, of_keys = torch.ones_like(rows), _GROWTHS[case.growth](step)
    elif case.growth in _PEAKS:
        of_rows = rows % 7 == 3
        of_keys = (keys == case.seqlen_k * 2 // 3) * _PEAKS[case.growth]
    elif case.growth == "level":
        of_rows, of_keys = torch.ones_like(rows), torch.full(keys.shape, _LEVEL)
    else:
        raise ValueError(f"growth={case.growth!r} is not one of {', '.join(GROWTH_KINDS)}")
    q[..., 0] = of_rows
    k[..., 0] = of_keys / scale


def _make_mask(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    if case.mask == "padding":
        lengths = torch.randint(0, case.seqlen_k + 1, (case.batch,), generator=generator)
        lengths[0] = max(1, case.seqlen_k - 3)
        positions = torch.arange(case.seqlen_k)
        return (positions[None, :] < lengths[:, None])[:, None, None, :]
    if case.mask == "bool":
        shape = (1, case.num_heads_q, case.seqlen_q, case.seqlen_k)
        visible = torch.rand(shape, generator=generator) < 0.7
        visible[:, :, :1] = False
        return visible
    if case.mask == "triangle":
        everything = torch.ones(1, 1, case.seqlen_q, case.seqlen_k, dtype=torch.bool)
        triangle = everything.tril(case.seqlen_k - case.seqlen_q)
        triangle[..., 40::64, -1] = True
        return triangle
    if case.mask == "additive":
        shape = (1, 1, case.seqlen_q, case.seqlen_k)
        bias = torch.randn(shape, generator=generator)
        bias[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
        return bias.to(case.torch_dtype)
    raise ValueError(f"mask={case.mask!r} is not one of {', '.join(MASK_KINDS)}")


def _with_rows_apart(mask: Tensor, width: int) -> Tensor:
    """Return the mask with rows that start `width` elements apart, and what must not be read
    between them: True, or NaN."""
    *sizes, seqlen_k = mask.shape
    between = True if mask.dtype == torch.bool else torch.nan
    storage = torch.full((*sizes, width), between, dtype=mask.dtype)
    storage[..., :seqlen_k] = mask
    return storage[..., :seqlen_k]


def _place(values: Tensor, case: Case, device: str | torch.device) -> Tensor:
    """Put values [B, H, S, D] into a NaN-filled storage with the case's layout, tail and offset."""
    batch, heads, seqlen, dim = values.shape
    rows = seqlen + case.tail
    size = batch * heads * rows * dim
    storage = torch.full((case.offset + size,), torch.nan, dtype=values.dtype, device=device)
    if case.layout == "bhsd":
        view = storage[case.offset :].view(batch, heads, rows, dim)
    elif case.layout == "bshd":
        view = storage[case.offset :].view(batch, rows, heads, dim).transpose(1, 2)
    else:
        raise ValueError(f"layout={case.layout!r} is not one of {', '.join(LAYOUTS)}")
    view = view[:, :, :seqlen]
    view.copy_(values)
    return view
