"""A Case is one attention call written down in numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch


class InNumbers:
    """A call InNumbers is a frozen dataclass of the numbers and words that make its tensors."""

    __slots__ = ()
    if TYPE_CHECKING:
        causal: str
        window: tuple[int, int] | None
        softcap: float | None
        scale: float | None

    def options(self) -> dict[str, Any]:
        """Return keyword arguments of the call (without its mask and sinks)."""
        return {
            "causal": False if self.causal == "none" else self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "scale": self.scale,
        }

    def describe(self) -> str:
        """Return one line with every field that is not the default."""
        this: Any = self
        values = {x.name: (getattr(self, x.name), x.default) for x in dataclasses.fields(this)}
        return " ".join(
            f"{n}={value}" for n, (value, default) in values.items() if value != default
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        this: Any = self
        return dataclasses.asdict(this)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case(InNumbers):
    """A case is one attention call in numbers.

    Lengths are in tokens, dims in elements. `mask`: "bool" is a random [1, num_heads_q, seqlen_q,
    seqlen_k] mask whose first row attends to nothing, "triangle" a [1, 1, seqlen_q, seqlen_k] one
    of what a causal call sees, and of the last key for one row in 64, "padding" a [batch, 1, 1,
    seqlen_k] one as tokenizers make it, "additive" a random bias [1, 1, seqlen_q, seqlen_k] with
    some -inf.
    `layout` is the order in memory; "bshd" is passed transposed, as a projection's output is.
    `tail` NaN rows follow every sequence in memory, `offset` elements precede the first one.
    `spread` multiplies q, so that the softmax gets sharper; `growth` is one of
    cases.GROWTH_KINDS: how scores grow along the keys. `sinks`: whether a random logit of each head
    joins the softmax. With an odd `seed` the mask's rows are
    aligned for wide loads, with every other even one they are an odd number of elements apart.
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
    sinks: bool = False
    seed: int = 0
    return_max_score: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the element type as torch names it."""
        result = getattr(torch, self.dtype)
        assert isinstance(result, torch.dtype)
        return result

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
        if self.return_max_score:
            words.append("return_max_score")
        if self.sinks:
            words.append("sinks")
        return " ".join(words)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
