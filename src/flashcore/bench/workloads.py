"""What is timed: the shapes, their floating-point operations and their bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The paper sweep: always 16k tokens and a hidden size of 2048, so that the work per row of the
# table differs only by seqlen (FlashAttention-2, arXiv:2307.08691, section 4.1).
_TOKENS, _HIDDEN = 16384, 2048
_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Workload:
    """One self-attention forward: q, k, v [batch, num_heads, seqlen, head_dim] from N(0, 1)."""

    group: str
    batch: int
    num_heads: int
    seqlen: int
    head_dim: int
    causal: bool
    dtype: str = "float16"

    @property
    def name(self) -> str:
        """Such as "B1 H8 S512 D64 causal"."""
        kind = "causal" if self.causal else "full"
        return f"B{self.batch} H{self.num_heads} S{self.seqlen} D{self.head_dim} {kind}"

    @property
    def flops(self) -> float:
        """Two matrix products, 2 operations a multiply-add; causal counts half, as is usual."""
        full = 4.0 * self.batch * self.num_heads * self.seqlen**2 * self.head_dim
        return full / 2 if self.causal else full

    @property
    def num_bytes(self) -> float:
        """q, k, v read once and out written once, in bytes."""
        element = 4 if self.dtype == "float32" else 2
        return 4.0 * element * self.batch * self.num_heads * self.seqlen * self.head_dim

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: views of [batch, seqlen, num_heads, head_dim], as projections write them."""
        generator = torch.Generator(device=device).manual_seed(0)
        shape = (self.batch, self.seqlen, self.num_heads, self.head_dim)
        dtype = getattr(torch, self.dtype)
        q, k, v = (
            torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2)
            for _ in range(3)
        )
        return q, k, v


def seed_shape(dtype: str = "float16") -> list[Workload]:
    """The project's first benchmark: B1 H8 S512 D64."""
    return [Workload("seed", 1, 8, 512, 64, causal, dtype) for causal in (False, True)]


def sweep(quick: bool = False) -> list[Workload]:
    """16k tokens, hidden size 2048, head_dim 64 to 256, seqlen 512 to 16k, full and causal."""
    seqlens = (1024, 4096) if quick else _SEQLENS
    return [
        Workload(
            "sweep", _TOKENS // seqlen, _HIDDEN // head_dim, seqlen, head_dim, causal, "bfloat16"
        )
        for head_dim in ((64, 128) if quick else (64, 128, 256))
        for causal in (False, True)
        for seqlen in seqlens
    ]


def cpu_shapes() -> list[Workload]:
    """What a CPU can do in seconds."""
    return seed_shape("float32")
