"""Make the backward pass of a case: its arguments, and the gradients that it must have."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashcore.backends.packed import packed_problem
from flashcore.backends.tiled import attention_tiled
from flashcore.checks.cases import make_inputs
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs
from flashcore.isolate.gate_models import Expected
from flashcore.isolate.gradient_model import GradientModel
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.ops.padded import padded_problem
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Inputs, Options


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedCase(Case):
    """A PaddedCase is a Case with `seqlens_k`: how many keys each sequence of its batch has."""

    lengths_k: tuple[int, ...]

    def describe(self) -> str:
        """Return one line that names the shape and every option that is not the default."""
        return f"{Case.describe(self)} lengths_k={self.lengths_k}"


class Part(NamedTuple):
    """A part is what the kernels compute as one call: everything, or one sequence."""

    problem: Problem
    batch: slice
    rows: slice
    keys: slice


class BackwardCall(NamedTuple):
    """Hold the arguments of a backward pass. What arrives at rows that see nothing is NaN.

    Tensors are [batch, num_heads, seqlen, head_dim], where sequences are packed with a batch of 1;
    lse and dlse [batch, num_heads_q, seqlen_q]. `lengths` says where sequences end, by the kernels'
    names.
    """

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor
    lengths: Mapping[str, Tensor]
    parts: tuple[Part, ...]

    def expected(self, plan: Plan) -> dict[str, Expected]:
        """Return delta, dq, dv and dk by name; 0 where there is no sequence, or nothing to see."""
        shapes = {"delta": self.lse, "dq": self.q, "dv": self.v, "dk": self.k}
        whole = {
            name: (x.new_zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape).double())
            for name, x in shapes.items()
        }
        for own, batch, rows, keys in self.parts:
            if not (own.seqlen_q and own.seqlen_k):
                continue
            q, out, lse, dout, dlse = (
                x[batch, :, rows] for x in (self.q, self.out, self.lse, self.dout, self.dlse)
            )
            k, v = (x[batch, :, keys] for x in (self.k, self.v))
            model = GradientModel(own, plan, q, k, v, self.mask, out, lse, dout, dlse)
            for of_tensor, at in ((model.of_rows(), rows), (model.of_keys(), keys)):
                for found in of_tensor:
                    value, tolerance = whole[found.name]
                    value[batch, :, at], tolerance[batch, :, at] = found.value, found.tolerance
        return {name: Expected(name, *pair) for name, pair in whole.items()}


def backward_call(case: Case | VarlenCase) -> BackwardCall:
    """Return the backward pass of a case.

    Raises:
        ValueError: there is nothing to compute.
    """
    lengths: dict[str, Tensor] = {}
    mask = None
    if isinstance(case, VarlenCase):
        x = make_varlen_inputs(case)
        problem = packed_problem(*x.arguments(), **case.options())
        q, k, v = (as_batch(tensor) for tensor in (x.q, x.k, x.v))
        lengths = {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
        ends = zip(
            itertools.pairwise(x.cu_seqlens_q.tolist()),
            itertools.pairwise(x.cu_seqlens_k.tolist()),
            strict=True,
        )
        parts = [
            Part(problem.of_sequence(b - a, d - c), slice(None), slice(a, b), slice(c, d))
            for (a, b), (c, d) in ends
        ]
    else:
        y = make_inputs(case)
        q, k, v, mask = y.q, y.k, y.v, y.mask
        problem = Problem.from_tensors(q, k, v, mask=mask, return_lse=True, **case.options())
        everything = slice(None)
        parts = [Part(problem, everything, everything, everything)]
        if isinstance(case, PaddedCase):
            seqlens_k = torch.tensor(case.lengths_k, dtype=torch.int32)
            lengths = {"seqlens_k": seqlens_k}
            options = Options.checked(**case.options())
            problem = padded_problem(Inputs(q, k, v, None, seqlens_k), options)
            parts = [
                Part(problem.of_sequence(case.seqlen_q, n), slice(i, i + 1), everything, slice(n))
                for i, n in enumerate(case.lengths_k)
            ]
    if problem.is_empty:
        raise ValueError(f"{problem.describe()}: there is nothing to compute in an empty case")
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(q.shape[:3], -math.inf)
    for own, batch, rows, keys in parts:
        if own.seqlen_q and own.seqlen_k:
            tensors = q[batch, :, rows], k[batch, :, keys], v[batch, :, keys]
            out[batch, :, rows], lse[batch, :, rows] = attention_tiled(own, *tensors, mask)
    generator = torch.Generator().manual_seed(case.seed)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse))
    is_empty = lse == -math.inf
    dout = dout.masked_fill(is_empty[..., None], math.nan)
    dlse = dlse.masked_fill(is_empty, math.nan)
    return BackwardCall(problem, q, k, v, mask, out, lse, dout, dlse, lengths, tuple(parts))


def planted_case(base: Case, options: Mapping[str, object]) -> Case:
    """Return `base` with options, of which `lengths_k` makes a PaddedCase of it."""
    if "lengths_k" not in options:
        return dataclasses.replace(base, **options)  # type: ignore[arg-type]
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(Case)}
    return PaddedCase(**(fields | dict(options)))
