"""Packed sequences with what their backward pass needs, and the error rule for the gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gradient_rule import wrong_gradients
from torch import Tensor

from flashcore.backends.packed import packed_problem
from flashcore.backends.tiled import attention_tiled
from flashcore.problem import Problem
from flashcore.problem.memory_layout import as_batch


@dataclass(frozen=True, kw_only=True)
class PackedCase:
    """A case is a call of attention_varlen in numbers; `tails` rows of q and of k, all NaN, follow
    the last sequence, and `layout` is one of varlen_cases.LAYOUTS."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    tails: tuple[int, int] = (0, 0)
    num_heads_kv: int = 2
    group: int = 1
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: str = "bfloat16"
    causal: bool | str = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    layout: str = "apart"
    through_lse: bool = False
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Return keyword arguments of attention_varlen."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap}

    def rows(self) -> list[tuple[slice, slice]]:
        """Return each sequence's rows of q, and of k and v."""
        ends_q, ends_k = (
            [0, *itertools.accumulate(lengths)] for lengths in (self.lengths_q, self.lengths_k)
        )
        slices_q, slices_k = (
            [slice(*pair) for pair in itertools.pairwise(ends)] for ends in (ends_q, ends_k)
        )
        return list(zip(slices_q, slices_k, strict=True))


class Packed(NamedTuple):
    """Hold the tensors of a case. Gradients that arrive at rows that see nothing are NaN."""

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None

    def lengths(self) -> dict[str, Tensor]:
        """Return what says where sequences end, by the kernels' names."""
        return {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}


def make_packed(case: PackedCase, device: str = "cpu") -> Packed:
    """Make the tensors of a case; the values do not depend on the device. out and lse are those of
    PyTorch operations."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    dim, dim_v = case.head_dim, case.head_dim_v or case.head_dim
    heads_kv, heads_q = case.num_heads_kv, case.num_heads_kv * case.group

    def normal(lengths: tuple[int, ...], tail: int, heads: int, columns: int) -> Tensor:
        x = torch.randn(sum(lengths) + tail, heads, columns, generator=generator)
        x[sum(lengths) :] = math.nan
        return x.to(dtype).to(device)

    if case.layout == "qkv":
        qkv = normal(case.lengths_q, case.tails[0], heads_q + 2 * heads_kv, dim)
        q, k, v = qkv.split((heads_q, heads_kv, heads_kv), dim=1)
    else:
        q = normal(case.lengths_q, case.tails[0], heads_q, dim)
        k, v = (normal(case.lengths_k, case.tails[1], heads_kv, x) for x in (dim, dim_v))
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (case.lengths_q, case.lengths_k)
    )
    longest = max(case.lengths_q), max(case.lengths_k)
    problem = packed_problem(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, **case.options())
    out = torch.zeros(q.shape[0], heads_q, dim_v, dtype=dtype, device=device)
    lse = torch.full((heads_q, q.shape[0]), -math.inf, device=device)
    for queries, keys in case.rows():
        own = problem.of_sequence(queries.stop - queries.start, keys.stop - keys.start)
        if own.seqlen_q and own.seqlen_k:
            tensors = (as_batch(x) for x in (q[queries], k[keys], v[keys]))
            own_out, own_lse = attention_tiled(own, *tensors, None)
            out[queries], lse[:, queries] = own_out[0].transpose(0, 1), own_lse[0]
    empty = lse == -math.inf
    dout = torch.randn(out.shape, generator=generator).to(dtype).to(device)
    dout = dout.masked_fill(empty.t()[..., None], math.nan)
    dlse = None
    if case.through_lse:
        dlse = torch.randn(lse.shape, generator=generator).to(device).masked_fill(empty, math.nan)
    return Packed(problem, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, dout, dlse)


def wrong_packed_gradients(case: PackedCase, x: Packed, gradients: tuple[Tensor, ...]) -> list[str]:
    """Return what is wrong: a line for each gradient of a sequence that breaks the error rule, and
    for what is not 0 where there is nothing to attend to."""
    wrong = []
    dq, dk, dv = gradients
    for number, (queries, keys) in enumerate(case.rows()):
        own = dq[queries], dk[keys], dv[keys]
        if queries.start == queries.stop or keys.start == keys.stop:
            wrong += [f"sequence {number}: not 0"] if any(g.any() for g in own) else []
            continue
        lines = wrong_gradients(
            tuple(as_batch(g) for g in own),
            *(as_batch(t) for t in (x.q[queries], x.k[keys], x.v[keys])), None,
            as_batch(x.dout[queries]), None if x.dlse is None else x.dlse[None, :, queries],
            case.options(), as_batch(x.out[queries]),
        )  # fmt: skip
        wrong += [f"sequence {number}: {line}" for line in lines]
    end_q, end_k = sum(case.lengths_q), sum(case.lengths_k)
    if case.layout == "qkv":
        end_k = end_q
    if dq[end_q:].any() or dk[end_k:].any() or dv[end_k:].any():
        wrong.append("rows behind the last sequence are not 0")
    return wrong
