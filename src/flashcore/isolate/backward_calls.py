"""Make the backward pass of a case: its arguments, and the gradients that it must have."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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

    def place(self, name: str) -> tuple[slice, ...]:
        """Return where it lies in delta, ds, dq, dv or dk; of ds keys count from 0 on."""
        place = self.batch, slice(None), self.keys if name in ("dv", "dk") else self.rows
        return (*place, slice(self.problem.seqlen_k)) if name == "ds" else place


class BackwardCall(NamedTuple):
    """Hold the arguments of a backward pass. What arrives at rows that see nothing is NaN.

    Tensors are [batch, num_heads, seqlen, head_dim], where sequences are packed with a batch of 1;
    lse and dlse [batch, num_heads_q, seqlen_q]. `lengths` says where sequences end, by the kernels'
    names. `arrives` is "out", "lse" or "both"; the gradient of the other one is 0.
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
    arrives: str = "both"

    @property
    def longest_k(self) -> int:
        """Return the keys that a row of what the gates read or write has room for."""
        return self.k.shape[2]

    def models(self, plan: Plan) -> list[tuple[Part, GradientModel]]:
        """Return the model of each part that has something to compute, of one of the kernels."""
        tensors = (self.q, self.k, self.v, self.out, self.lse, self.dout, self.dlse)
        q, k, v, out, lse, dout, dlse = (x.cpu() for x in tensors)
        mask = None if self.mask is None else self.mask.cpu()
        return [
            (
                part,
                GradientModel(
                    part.problem, plan, q[at], k[at_keys], v[at_keys], mask,
                    out[at], lse[at], dout[at], dlse[at],
                ),
            )
            for part in self.parts
            if part.problem.seqlen_q and part.problem.seqlen_k
            for at, at_keys in [(part.place("dq"), part.place("dk"))]
        ]  # fmt: skip

    def assembled(self, name: str, parts: Sequence[tuple[Part, Expected]]) -> Expected:
        """Return delta, ds, dq, dv or dk of all parts; 0 elsewhere, and ds whatever is there."""
        like = {"delta": self.lse, "dq": self.q, "dv": self.v, "dk": self.k}
        shapes = {own: tuple(x.shape) for own, x in like.items()}
        shapes["ds"] = (*self.lse.shape, self.longest_k)
        value, tolerance = (torch.zeros(shapes[name], dtype=torch.float64) for _ in range(2))
        optional = torch.full(shapes[name], name == "ds")
        for part, found in parts:
            at = part.place(name)
            value[at], tolerance[at] = found.value, found.tolerance
            optional[at] = False if found.optional is None else found.optional
        return Expected(name, value, tolerance, optional)

    def given(self, gate: str, models: Sequence[tuple[Part, GradientModel]]) -> Tensor:
        """Return what a gate takes over, [batch, num_heads_q, seqlen_q, seqlen_k]."""
        whole = torch.zeros((*self.lse.shape, self.longest_k))
        for part, model in models:
            whole[part.place("ds")] = model.given(gate)
        return whole


def backward_call(
    case: Case | VarlenCase, device: str = "cpu", arrives: str = "both"
) -> BackwardCall:
    """Return the backward pass of a case, its tensors on a device. Gradients arrive at "out", "lse"
    or "both".

    Raises:
        ValueError: there is nothing to compute.
    """
    lengths: dict[str, Tensor] = {}
    mask = None
    if isinstance(case, VarlenCase):
        x = make_varlen_inputs(case, device)
        problem = packed_problem(*x.arguments(), **case.options())
        q, k, v = (as_batch(tensor) for tensor in (x.q, x.k, x.v))
        sinks = x.sinks
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
        y = make_inputs(case, device)
        q, k, v, mask, sinks = y.q, y.k, y.v, y.mask, y.sinks
        problem = Problem.from_tensors(q, k, v, mask=mask, return_lse=True, **case.options())
        everything = slice(None)
        parts = [Part(problem, everything, everything, everything)]
        if isinstance(case, PaddedCase):
            seqlens_k = torch.tensor(case.lengths_k, dtype=torch.int32, device=device)
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
    lse = torch.full(q.shape[:3], -math.inf, device=device)
    for own, batch, rows, keys in parts:
        if own.seqlen_q and own.seqlen_k:
            tensors = q[batch, :, rows], k[batch, :, keys], v[batch, :, keys]
            found = attention_tiled(own, *tensors, mask, sinks=sinks)  # which lse has, no more
            out[batch, :, rows], lse[batch, :, rows] = found
    generator = torch.Generator().manual_seed(case.seed)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x) for x in (out, lse))
    is_empty = lse == -math.inf
    dout = dout.masked_fill(is_empty[..., None], math.nan)
    dlse = dlse.masked_fill(is_empty, math.nan)
    if arrives != "both":
        other = dlse if arrives == "out" else dout
        other.zero_()
    return BackwardCall(
        problem, q, k, v, mask, out, lse, dout, dlse, lengths, tuple(parts), arrives
    )


# --- calls and tiles that show the planted bugs, see registry.py

# Two heads of a group, rows that see nothing, keys that a warpgroup passes over, and more tiles of
# rows and of keys than the simulator has blocks.
BACKWARD: dict[str, Any] = {
    "batch": 2,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "seqlen_q": 170,
    "seqlen_k": 150,
    "head_dim": 32,
    "head_dim_v": 32,
    "dtype": "bfloat16",
    "causal": "lower_right",
}
BACKWARD_ROLES = BACKWARD | {"seqlen_q": 110, "head_dim": 136, "head_dim_v": 136}
# Two warpgroups of rows and of keys, of which some sequences fill one; rows behind the last one.
BACKWARD_PACKED: dict[str, Any] = {
    "lengths_q": (70, 5, 30),
    "lengths_k": (40, 130, 90),
    "tail": 70,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "head_dim": 32,
    "head_dim_v": 32,
    "dtype": "bfloat16",
    "causal": "lower_right",
}
# The last queries would see keys behind a sequence's last one, were there any.
BACKWARD_PADDED = BACKWARD | {
    "batch": 3,
    "num_heads_q": 2,
    "num_heads_kv": 1,
    "seqlen_q": 70,
    "causal": "none",
    "window": (-1, 5),
    "lengths_k": (40, 150, 97),
}
# Consumers share dq.
BACKWARD_SHARED = BACKWARD | {
    "seqlen_q": 200, "head_dim": 104, "head_dim_v": 16, "causal": "none",
}  # fmt: skip
# Rows that do not see the first keys.
BACKWARD_WINDOW = BACKWARD | {
    "num_heads_q": 2, "num_heads_kv": 1, "seqlen_q": 600, "seqlen_k": 400, "causal": "none",
    "window": (140, 20),
}  # fmt: skip
BACKWARD_MASKED = BACKWARD | {"mask": "additive", "causal": "none"}
# Rows of a mask that begin anywhere, so that a lane writes other elements than it reads.
MASK_GRADIENT = BACKWARD | {
    "mask": "additive", "causal": "upper_left", "seqlen_k": 141, "seed": 1, "dtype": "float16",
}  # fmt: skip
TILE_OF_DQ = {"block_m": 64, "block_n": 32, "num_stages": 3, "other_stages": 2}
TILE_OF_DKDV = {"block_m": 32, "block_n": 128, "num_stages": 3, "other_stages": 2}
TILE_OF_DKDV |= {"overlaps": False, "early_dp": True, "keeps_p": False}
TILE_OF_ONE = TILE_OF_DKDV | {"block_m": 64, "overlaps": True, "also_dq": True}
TILE_IN_ANY_ORDER = TILE_OF_ONE | {"ordered": False}
TILE_OF_SHARED = TILE_OF_ONE | {"early_dp": False, "ds_stages": 2}
TILE_OF_ROLES = {"block_m": 32, "block_n": 64, "num_stages": 2, "other_stages": 2}


def planted_case(base: Case, options: Mapping[str, object]) -> Case:
    """Return `base` with options, of which `lengths_k` makes a PaddedCase of it."""
    if "lengths_k" not in options:
        return dataclasses.replace(base, **options)  # type: ignore[arg-type]
    others = {name: x for name, x in options.items() if name != "lengths_k"}
    lengths_k: Any = options["lengths_k"]
    return padded_case(dataclasses.replace(base, **others), lengths_k)  # type: ignore[arg-type]


def padded_case(case: Case, lengths_k: tuple[int, ...]) -> PaddedCase:
    """Return a case whose sequences have so many keys."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(Case)}
    return PaddedCase(**fields, lengths_k=lengths_k)
