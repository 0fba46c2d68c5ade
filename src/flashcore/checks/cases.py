"""A Case is one attention call written down in numbers, and the tensors made from it.

verify draws cases, isolate and bench take them from the command line, and tests write them out.
A case and its seed always make the same tensors, on every machine (torch's CPU generator).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CAUSAL_KINDS = ("none", "upper_left", "lower_right")
MASK_KINDS = ("none", "bool", "padding", "additive")
LAYOUTS = ("bhsd", "bshd")
# What a key's score has on top, in nats, by the number of its step; steps are counted from the last
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A case is one attention call in numbers.

    Lengths are in tokens, dims in elements. `mask`: "bool" is a random [1, num_heads_q, seqlen_q,
    seqlen_k] mask whose first row attends to nothing, "padding" a [batch, 1, 1, seqlen_k] one as
    tokenizers make it, "additive" a random bias [1, 1, seqlen_q, seqlen_k] with some -inf.
    `layout` is the order in memory; "bshd" is passed transposed, as a projection's output is.
    `tail` NaN rows follow every sequence in memory, `offset` elements precede the first one.
    `spread` multiplies q, so that the softmax gets sharper; `growth` is one of GROWTH_KINDS: how
    scores grow along the keys. With an odd `seed` the mask's rows are aligned for wide loads, with
    every other even one they are an odd number of elements apart.
    """

    batch: int = 1
    num_heads_q: int = 2
    num_heads_kv: int = 2
    seqlen_q: int = 128
    seqlen_k: int = 128
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "float16"
    causal: str = "none"
    window: tuple[int, int] | None = None
    softcap: float | None = None
    scale: float | None = None
    mask: str = "none"
    layout: str = "bhsd"
    tail: int = 0
    offset: int = 0
    spread: float = 1.0
    growth: str = "none"
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the element type as torch names it."""
        result = getattr(torch, self.dtype)
        assert isinstance(result, torch.dtype)
        return result

    def options(self) -> dict[str, Any]:
        """Return keyword arguments for flashcore.attention and its relatives (without the mask)."""
        return {
            "causal": False if self.causal == "none" else self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "scale": self.scale,
        }

    def describe(self) -> str:
        """Return one line that names the shape and every option that is not the default."""
        words = [
            f"B{self.batch}",
            f"H{self.num_heads_q}"
            + (f"/{self.num_heads_kv}" if self.num_heads_kv != self.num_heads_q else ""),
            f"S{self.seqlen_q}" + (f"/{self.seqlen_k}" if self.seqlen_k != self.seqlen_q else ""),
            f"D{self.head_dim}"
            + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""),
            self.dtype,
        ]
        if self.causal != "none":
            words.append(f"causal={self.causal}")
        for name in ("window", "softcap", "scale"):
            value = getattr(self, name)
            if value is not None:
                words.append(f"{name}={_short(value)}")
        if self.mask != "none":
            words.append(f"mask={self.mask}")
        if self.layout != "bhsd":
            words.append(self.layout)
        for name in ("tail", "offset"):
            if getattr(self, name):
                words.append(f"{name}={getattr(self, name)}")
        if self.spread != 1.0:
            words.append(f"spread={_short(self.spread)}")
        if self.growth != "none":
            words.append(f"growth={self.growth.replace(' ', '-')}")
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs are the tensors of a case: q, k, v [batch, num_heads, seqlen, head_dim] and the mask
    or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


def make_inputs(case: Case, device: str | torch.device = "cpu") -> Inputs:
    """Make the tensors of a case.

    Args:
        case: what to make.
        device: where the tensors go; the values do not depend on it.

    Returns:
        q, k, v with the strides, offset and NaN tail that the case asks for, and the mask.
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
    return Inputs(q, k, v, mask)


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


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
