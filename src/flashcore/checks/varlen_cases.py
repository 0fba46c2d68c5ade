"""A VarlenCase is one call of `attention_varlen` in numbers, its tensors, and its judgement.

As checks/cases.py for `attention`: a case and its seed always make the same tensors, on every
machine.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcore.checks.accuracy import ErrorReport, error_report
from flashcore.problem.case import InNumbers

LAYOUTS = ("apart", "qkv")
# Lengths that break kernels: 0, 1, and those around tiles of 16 to 128 rows.
_LENGTHS = (0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 97, 127, 128, 129)


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenCase(InNumbers):
    """A case is one call of attention_varlen in numbers.

    Lengths are in tokens, dims in elements. `layout`: "apart", or "qkv" for slices of one packed
    [total, num_heads_q + 2 * num_heads_kv, head_dim] tensor (then lengths_k is lengths_q, and
    head_dim_v is head_dim). `tail` rows of NaN follow the last sequence, and `overrun` is how far
    behind the tensors it is said to end. `sinks`: whether a random logit of each head joins the
    softmax.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    num_heads_q: int = 2
    num_heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "float16"
    causal: str = "none"
    window: tuple[int, int] | None = None
    softcap: float | None = None
    scale: float | None = None
    layout: str = "apart"
    tail: int = 0
    overrun: int = 0
    sinks: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class VarlenInputs:
    """Inputs are the tensors of a case, as attention_varlen takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    sinks: Tensor | None = None

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
        """Return the arguments in the order of attention_varlen, without the sinks."""
        return (
            self.q,
            self.k,
            self.v,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
        )

    @property
    def others(self) -> dict[str, Tensor]:
        """Return what a kernel is given besides q, k and v, by name."""
        sinks = {} if self.sinks is None else {"sinks": self.sinks}
        return {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k} | sinks


def draw_varlen_case(seed: int, *, lengths: Sequence[int] = _LENGTHS, **fixed: Any) -> VarlenCase:
    """Draw a random case of sequences of some of these lengths; `fixed` fields stay as given."""
    rng = random.Random(seed)
    batch = rng.choice((1, 2, 3, 5, 8))
    layout = fixed.get("layout", rng.choice(LAYOUTS))
    lengths_q = tuple(rng.choice(lengths) for _ in range(batch))
    lengths_k = tuple(rng.choice(lengths) for _ in range(batch))
    if fixed.get("head_dim", 64) != fixed.get("head_dim_v", 64):
        layout = "apart"
    heads_kv = rng.choice((1, 2))
    drawn: dict[str, Any] = {
        "lengths_q": lengths_q,
        "lengths_k": lengths_q if layout == "qkv" or rng.random() < 0.3 else lengths_k,
        "num_heads_kv": heads_kv,
        "num_heads_q": heads_kv * rng.choice((1, 2)),
        "layout": layout,
        "tail": rng.choice((0, 0, 5, 70)),
        "seed": seed,
    }
    return VarlenCase(**(drawn | fixed))


def make_varlen_inputs(case: VarlenCase, device: str | torch.device = "cpu") -> VarlenInputs:
    """Make the tensors of a case.

    Args:
        case: what to make.
        device: where the tensors go; the values do not depend on it.

    Returns:
        q, k, v with the strides and the NaN tail that the case asks for, the lengths and the sinks.
    """
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def normal(total: int, heads: int, dim: int) -> Tensor:
        values = torch.randn(total, heads, dim, generator=generator).to(dtype)
        tail = torch.full((case.tail, heads, dim), torch.nan, dtype=dtype)
        return torch.cat([values, tail]).to(device)

    total_q, total_k = sum(case.lengths_q), sum(case.lengths_k)
    heads_q, heads_kv = case.num_heads_q, case.num_heads_kv
    if case.layout == "qkv":
        qkv = normal(total_q, heads_q + 2 * heads_kv, case.head_dim)
        q, k, v = qkv.split((heads_q, heads_kv, heads_kv), dim=1)
    else:
        q = normal(total_q, heads_q, case.head_dim)
        k = normal(total_k, heads_kv, case.head_dim)
        v = normal(total_k, heads_kv, case.head_dim_v)
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (case.lengths_q, case.lengths_k)
    )
    if case.overrun:
        for cu_seqlens in (cu_seqlens_q, cu_seqlens_k):
            cu_seqlens[-1] += case.tail + case.overrun
    sinks = None
    if case.sinks:
        sinks = (torch.randn(heads_q, generator=generator) * 4.0 + 3.0).to(device)
    return VarlenInputs(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max(case.lengths_q, default=0),
        max(case.lengths_k, default=0), sinks,
    )  # fmt: skip


def varlen_error_report(
    out: Tensor, lse: Tensor, case: VarlenCase, x: VarlenInputs
) -> ErrorReport | None:
    """Apply the error rule, sequence by sequence.

    Args:
        out: [total_q, num_heads_q, head_dim_v], the result.
        lse: [num_heads_q, total_q].
        case: what was asked.
        x: the case's tensors.

    Returns:
        The report of the first sequence that fails, else of the last one; None if there is no
        query. Rows behind the last sequence count as one without keys.
    """

    def rows(tensor: Tensor, begin: int, count: int) -> Tensor:
        return tensor[begin : begin + count].unsqueeze(0).transpose(1, 2)

    report = None
    begin_q = begin_k = 0
    tail = (out.shape[0] - sum(case.lengths_q), 0)
    for length_q, length_k in (*zip(case.lengths_q, case.lengths_k, strict=True), tail):
        if length_q:
            report = error_report(
                rows(out, begin_q, length_q),
                rows(x.q, begin_q, length_q).nan_to_num(),  # the tail is NaN and sees nothing
                rows(x.k, begin_k, length_k),
                rows(x.v, begin_k, length_k),
                lse=lse[None, :, begin_q : begin_q + length_q],
                sinks=x.sinks,
                **case.options(),
            )
            if not report.ok:
                return report
        begin_q, begin_k = begin_q + length_q, begin_k + length_k
    return report
