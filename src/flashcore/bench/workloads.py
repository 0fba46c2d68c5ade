"""Define what is timed: the shapes and options, their floating-point operations and their bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The paper sweep: always 16k tokens and a hidden size of 2048, so that the work per row of the
# table differs only by seqlen (FlashAttention-2, arXiv:2307.08691, section 4.1).
_TOKENS, _HIDDEN = 16384, 2048
_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
_WINDOW_TILE = 128

MASKS = ("bool", "padding", "additive")


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload is one attention forward on N(0, 1).

    Args:
        group: the table it stands in.
        batch: sequences.
        num_heads: heads of q.
        seqlen: of q.
        head_dim: of q, k and v.
        causal: query i sees keys up to i.
        dtype: of q, k and v.
        num_heads_kv: heads of k and v; None: as of q.
        seqlen_k: of k and v; None: as of q.
        window: (left, right) as in `attention`.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        mask: "bool" [1, 1, seqlen, seqlen], "padding" (bool, [batch, 1, 1, seqlen]) or "additive"
            [1, num_heads, seqlen, seqlen].
        lengths: of sequences packed one after the other, `seqlen` tokens in all; batch is 1.
        compiles: also timed by peers that take seconds to compile for a shape.
    """

    group: str
    batch: int
    num_heads: int
    seqlen: int
    head_dim: int
    causal: bool
    dtype: str = "float16"
    num_heads_kv: int | None = None
    seqlen_k: int | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    mask: str | None = None
    lengths: tuple[int, ...] | None = None
    compiles: bool = False

    @property
    def heads_kv(self) -> int:
        """Return heads of k and v."""
        return self.num_heads if self.num_heads_kv is None else self.num_heads_kv

    @property
    def keys(self) -> int:
        """Return keys of a sequence."""
        return self.seqlen if self.seqlen_k is None else self.seqlen_k

    @property
    def name(self) -> str:
        """Return a name such as "B1 H8 S512 D64 causal", "B1 H32/8 S1/2048 D128 full"."""
        heads = str(self.num_heads)
        if self.num_heads_kv is not None:
            heads += f"/{self.num_heads_kv}"
        length = str(self.seqlen)
        if self.seqlen_k is not None:
            length += f"/{self.seqlen_k}"
        parts = [f"B{self.batch} H{heads} S{length} D{self.head_dim}"]
        if self.lengths is not None:
            parts = [
                f"{len(self.lengths)} sequences to {max(self.lengths)} of {length} "
                f"H{heads} D{self.head_dim}"
            ]
        parts.append("causal" if self.causal else "full")
        if self.window is not None:
            parts.append(f"window {self.window[0]},{self.window[1]}")
        if self.softcap is not None:
            parts.append(f"softcap {self.softcap:g}")
        if self.mask is not None:
            parts.append(f"{self.mask} mask")
        return " ".join(parts)

    @property
    def flops(self) -> float:
        """Return the operations of two matrix products, 2 operations a multiply-add. Causal counts
        half, as is usual, a window the keys in it, a mask tensor nothing less."""
        pairs = float(self.seqlen * self.keys)
        if self.lengths is not None:
            pairs = float(sum(length * length for length in self.lengths))
        if self.window is not None:
            pairs = float(sum(last - first for first, last in map(self._band, range(self.seqlen))))
        elif self.causal:
            pairs /= 2
        return 4.0 * self.batch * self.num_heads * pairs * self.head_dim

    @property
    def num_bytes(self) -> float:
        """Return the bytes of q, k, v and the mask tensor, read once, and of out, written once."""
        element = 4 if self.dtype == "float32" else 2
        rows = 2 * self.num_heads * self.seqlen + 2 * self.heads_kv * self.keys
        square = self.seqlen * self.keys
        mask = {
            None: 0,
            "bool": square,
            "padding": self.batch * self.keys,
            "additive": element * self.num_heads * square,
        }[self.mask]
        return float(element * self.batch * rows * self.head_dim + mask)

    @property
    def window_tiles(self) -> int:
        """Return the number of tiles of 128 queries x 128 keys of one head that hold a visible
        pair."""
        count = 0
        for row in range(0, self.seqlen, _WINDOW_TILE):
            first, _ = self._band(row)
            _, last = self._band(min(row + _WINDOW_TILE, self.seqlen) - 1)
            count += -(-last // _WINDOW_TILE) - first // _WINDOW_TILE
        return count

    def _band(self, row: int) -> tuple[int, int]:
        """Return first key that a query sees, and the one after its last, by position."""
        left, right = (-1, -1) if self.window is None else self.window
        aligned = row + self.keys - self.seqlen
        first = 0 if left < 0 else max(0, aligned - left)
        if self.causal:
            right = 0
        last = self.keys if right < 0 else min(self.keys, aligned + right + 1)
        return first, last

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v: views of [batch, seqlen, num_heads, head_dim], as projections write
        them."""
        generator = torch.Generator(device=device).manual_seed(0)
        dtype = getattr(torch, self.dtype)

        def draw(seqlen: int, heads: int) -> Tensor:
            shape = (self.batch, seqlen, heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2)

        keys, heads_kv = self.keys, self.heads_kv
        return draw(self.seqlen, self.num_heads), draw(keys, heads_kv), draw(keys, heads_kv)

    def mask_tensor(self, device: str) -> Tensor | None:
        """Return the mask, as `attention` takes it. Every row keeps a key: what an empty row is
        differs between libraries."""
        if self.mask is None:
            return None
        generator = torch.Generator(device=device).manual_seed(1)
        if self.mask == "padding":
            lengths = torch.linspace(self.keys, self.keys // 2, self.batch, device=device)
            return (torch.arange(self.keys, device=device) < lengths[:, None])[:, None, None, :]
        heads = self.num_heads if self.mask == "additive" else 1
        drawn = torch.rand((1, heads, self.seqlen, self.keys), generator=generator, device=device)
        if self.mask == "additive":
            return drawn.to(getattr(torch, self.dtype))
        keep = drawn < 0.75
        keep[..., 0] = True
        return keep


def seed_shape(dtype: str = "float16") -> list[Workload]:
    """Return the project's first benchmark: B1 H8 S512 D64."""
    return [
        Workload("seed", 1, 8, 512, 64, causal, dtype, compiles=True) for causal in (False, True)
    ]


def sweep(quick: bool = False) -> list[Workload]:
    """Return 16k tokens at hidden size 2048: head_dim 64 to 256, seqlen 512 to 16k, full and
    causal."""
    return [
        Workload(
            "sweep",
            _TOKENS // seqlen,
            _HIDDEN // head_dim,
            seqlen,
            head_dim,
            causal,
            "bfloat16",
            compiles=seqlen in (1024, 8192) and head_dim < 256,
        )
        for head_dim in ((64, 128) if quick else (64, 128, 256))
        for causal in (False, True)
        for seqlen in ((1024, 4096) if quick else _SEQLENS)
    ]


def gqa() -> list[Workload]:
    """Return shapes with fewer heads of k and v, as Llama and Mistral have."""
    return [
        Workload(
            "gqa", 1, heads, seqlen, 128, True, "bfloat16", 8, compiles=heads * seqlen == 2**18
        )
        for seqlen in (2048, 8192)
        for heads in (32, 64)
    ]


def small() -> list[Workload]:
    """Return calls that do not fill a GPU: each length and number of heads full at one head_dim,
    causal at the other; float16 at head_dim 64, bfloat16 at 128."""
    return [
        Workload(
            "small",
            batch,
            heads,
            seqlen,
            head_dim,
            (number + index + head_dim // 64) % 2 == 0,
            "float16" if head_dim == 64 else "bfloat16",
        )
        for head_dim in (64, 128)
        for index, (batch, heads) in enumerate(((1, 8), (1, 32), (4, 16)))
        for number, seqlen in enumerate((128, 256, 512, 1024))
    ]


def window() -> list[Workload]:
    """Return a sliding window over long sequences, and the same without it, to compare with."""
    return [
        Workload(
            "window", 1, 2048 // dim, 16384, dim, True, "bfloat16", window=bounds, compiles=True
        )
        for dim in (128, 64)
        for bounds in (None, (1024, 0))
    ]


def masked() -> list[Workload]:
    """Return shapes with mask tensors, and with soft-capping as Gemma 2 has it."""
    return [
        Workload("masked", 4, 32, 2048, 64, False, mask="bool"),
        Workload("masked", 4, 16, 2048, 128, False, "bfloat16", mask="bool", compiles=True),
        Workload("masked", 16, 12, 512, 64, False, mask="padding"),
        Workload("masked", 4, 16, 2048, 128, False, "bfloat16", mask="additive"),
        Workload("masked", 4, 32, 1731, 64, False, mask="bool"),  # rows aligned for no wide load
        Workload("masked", 4, 8, 2048, 256, False, "bfloat16", mask="bool"),
        Workload("masked", 4, 16, 2048, 128, True, "bfloat16", softcap=50.0, compiles=True),
        Workload("masked", 1, 8, 8192, 256, True, "bfloat16", 4, softcap=50.0),
    ]


def decode() -> list[Workload]:
    """Return shapes with one new query for a cache of keys and values."""
    return [
        Workload(
            "decode",
            batch,
            32,
            1,
            128,
            False,
            "bfloat16",
            8,
            keys,
            compiles=batch * keys == 2**18,
        )
        for batch in (1, 16)
        for keys in (2048, 16384)
    ]


def decode_more() -> list[Workload]:
    """Return decoding with other heads, head_dims and batches, and a few queries at once, as
    drafted tokens are checked."""
    shapes = [
        (1, 32, 32, 1, 4096, 128),
        (1, 32, 1, 1, 16384, 128),
        (8, 64, 8, 1, 8192, 128),
        (128, 32, 8, 1, 2048, 128),
        (1, 32, 8, 4, 16384, 128),
        (16, 32, 8, 16, 4096, 128),
        (4, 16, 16, 1, 8192, 64),
        (4, 8, 1, 1, 8192, 256),
    ]
    return [
        Workload("decode-more", batch, heads, queries, dim, False, "bfloat16", heads_kv, keys)
        for batch, heads, heads_kv, queries, keys, dim in shapes
    ]


def varlen() -> list[Workload]:
    """Return 32 packed sequences of log-normal lengths, 16k tokens in all."""
    return [
        Workload(
            "varlen",
            1,
            2048 // head_dim,
            _TOKENS,
            head_dim,
            causal,
            "bfloat16",
            lengths=log_normal_lengths(32, _TOKENS, sigma),
        )
        for head_dim, sigma in ((128, 1.0), (128, 0.5), (64, 1.0))
        for causal in (True, False)
    ]


def log_normal_lengths(count: int, total: int, sigma: float) -> tuple[int, ...]:
    """Return lengths with the given sum; the same in every run."""
    rng = random.Random(0)
    drawn = [rng.lognormvariate(0.0, sigma) for _ in range(count)]
    lengths = [max(1, int(x * total / sum(drawn))) for x in drawn]
    lengths[lengths.index(max(lengths))] += total - sum(lengths)
    return tuple(lengths)


GROUPS: dict[str, Callable[[], list[Workload]]] = {
    "seed": seed_shape,
    "sweep": sweep,
    "gqa": gqa,
    "small": small,
    "window": window,
    "masked": masked,
    "decode": decode,
    "decode-more": decode_more,
    "varlen": varlen,
}


def cpu_shapes() -> list[Workload]:
    """Return what a CPU can do in seconds."""
    return seed_shape("float32")
