"""Make the call that `flashcore explain` explains: its function, and tensors that are never filled,
as nothing reads values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor

import flashcore
from flashcore.problem.scales import CACHE_DTYPES

INT32 = torch.int32


@dataclass(frozen=True)
class Asked:
    """Hold what says which kind of call it is.

    Args:
        lengths: those of packed sequences of queries; None: the batch is padded.
        seqlen_k: keys of each sequence as given; None: as many as queries.
        seqlens_k: whether only the device knows how many keys there are.
        page_size: of a cache in pages; None: there are none.
        append: whether the tokens of the queries are new to a cache.
        cache_dtype: of a cache of 8 bits; None: keys have the dtype of q.
        device: of all tensors.
    """

    lengths: list[int] | None
    seqlen_k: int | None
    seqlens_k: bool
    page_size: int | None
    append: bool
    cache_dtype: str | None
    device: str


def parse_lengths(text: str | None) -> list[int] | None:
    """Return "512,2x17" as [512, 17, 17]; None as it is."""
    if text is None:
        return None
    lengths: list[int] = []
    for part in text.split(","):
        count, times, length = part.strip().rpartition("x")
        if not length.isdigit() or (times and not count.isdigit()):
            raise typer.BadParameter(
                f"--packed {part.strip()} is no length; pass lengths such as 512,300,17 or 8x512"
            )
        lengths += [int(length)] * int(count or 1)
    return lengths


def call_of(case: Any, asked: Asked) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that explains a call, and the call's tensors by name."""
    if case.layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout={case.layout!r} is not one of bhsd, bshd")
    if asked.cache_dtype not in (None, *CACHE_DTYPES.values()):
        known = ", ".join(CACHE_DTYPES.values())
        raise ValueError(f"--cache-dtype {asked.cache_dtype} is not one of {known}")
    if asked.lengths is not None:
        if case.batch not in (1, len(asked.lengths)):
            raise ValueError(f"--batch {case.batch} is given, but --packed has the lengths of all")
        if case.mask != "none":
            raise ValueError("--mask is given with --packed; packed sequences take none")
    made = _Tensors(case, asked)
    sinks = {"sinks": made.zeros(case.num_heads_q)} if case.sinks else {}
    if asked.page_size is not None or asked.append:
        return flashcore.explain_with_kvcache, made.step() | sinks
    if asked.lengths is None:
        return flashcore.explain, made.dense() | sinks
    if asked.seqlens_k or asked.cache_dtype is not None:
        raise ValueError("--packed has --seqlens-k and --cache-dtype with --page-size alone")
    return flashcore.explain_varlen, made.packed() | sinks


class _Tensors:
    """Make the tensors of a call."""

    def __init__(self, case: Any, asked: Asked) -> None:
        self.case, self.asked = case, asked
        self.lengths = asked.lengths
        self.batch = case.batch if asked.lengths is None else len(asked.lengths)
        self.dims = case.head_dim, case.head_dim_v

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.asked.device)

    def rows(self, batch: int, heads: int, seqlen: int, dim: int, cache: bool = False) -> Tensor:
        """Return [batch, heads, seqlen, dim], in memory as the layout says."""
        is_8_bits = cache and self.asked.cache_dtype is not None
        dtype = torch.float8_e4m3fn if is_8_bits else self.case.torch_dtype
        if self.case.layout == "bshd":
            return self.zeros(batch, seqlen, heads, dim, dtype=dtype).transpose(1, 2)
        return self.zeros(batch, heads, seqlen, dim, dtype=dtype)

    def queries(self, heads: int, dim: int) -> Tensor:
        """Return q, or as many rows of other heads, padded or packed."""
        if self.lengths is None:
            return self.rows(self.batch, heads, self.case.seqlen_q, dim)
        return self.zeros(sum(self.lengths), heads, dim, dtype=self.case.torch_dtype)

    def ends(self) -> Tensor:
        return self.zeros(self.batch + 1, dtype=INT32)

    def mask(self, seqlen_k: int) -> dict[str, Tensor]:
        if self.case.mask == "none":
            return {}
        rows = 1 if self.case.mask == "padding" else self.case.seqlen_q
        dtype = self.case.torch_dtype if self.case.mask == "additive" else torch.bool
        return {"mask": self.zeros(1, 1, rows, seqlen_k, dtype=dtype)}

    def lengths_of_keys(self) -> dict[str, Tensor]:
        found = {"seqlens_k": self.zeros(self.batch, dtype=INT32)}
        if self.asked.cache_dtype is not None:
            found |= {"k_scale": self.zeros(), "v_scale": self.zeros()}
        return found

    def dense(self) -> dict[str, Any]:
        case, is_padded = self.case, self.asked.seqlens_k or self.asked.cache_dtype is not None
        keys = [
            self.rows(self.batch, case.num_heads_kv, case.seqlen_k, dim, True) for dim in self.dims
        ]
        q = self.queries(case.num_heads_q, case.head_dim)
        lengths = self.lengths_of_keys() if is_padded else {}
        return {"q": q, "k": keys[0], "v": keys[1], **self.mask(case.seqlen_k), **lengths}

    def packed(self) -> dict[str, Any]:
        assert self.lengths is not None
        case, given = self.case, self.asked.seqlen_k
        keys = self.lengths if given is None else [given] * self.batch
        k, v = (
            self.zeros(sum(keys), case.num_heads_kv, dim, dtype=case.torch_dtype)
            for dim in self.dims
        )
        q = self.queries(case.num_heads_q, case.head_dim)
        longest = max(self.lengths, default=0), max(keys, default=0)
        return {
            "q": q, "k": k, "v": v, "cu_seqlens_q": self.ends(), "cu_seqlens_k": self.ends(),
            "max_seqlen_q": longest[0], "max_seqlen_k": longest[1],
        }  # fmt: skip

    def step(self) -> dict[str, Any]:
        case, page = self.case, self.asked.page_size
        found: dict[str, Any] = {"q": self.queries(case.num_heads_q, case.head_dim)}
        num_rows, length, columns = self.batch, case.seqlen_k, 1
        if page is not None:
            columns = -(-case.seqlen_k // page)
            found["page_table"] = self.zeros(self.batch, columns, dtype=INT32)
            num_rows, length = self.batch * columns, page
        for name, dim in zip("kv", self.dims, strict=True):
            found[f"{name}_cache"] = self.rows(num_rows, case.num_heads_kv, length, dim, True)
            if self.asked.append:
                found[f"{name}_new"] = self.queries(case.num_heads_kv, dim)
        if self.lengths is not None:
            found |= {"cu_seqlens_q": self.ends(), "max_seqlen_q": max(self.lengths, default=0)}
        return {**found, **self.mask(columns * length), **self.lengths_of_keys()}
