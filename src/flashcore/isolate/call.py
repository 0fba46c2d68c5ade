"""Make the call that isolate takes apart, from a case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashcore.backends.packed import packed_problem
from flashcore.checks.cases import make_inputs
from flashcore.checks.paged_cases import Cache, PagedCase, make_paged_inputs
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs
from flashcore.isolate.gate_models import Expected
from flashcore.isolate.sequence_models import packed_attention, paged_attention
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.ops.paged import paged_problem
from flashcore.ops.paged_varlen import packed_pages_problem
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Options, Wanted


@dataclass(frozen=True, slots=True)
class Call:
    """Hold what a case asks for, and its tensors as the kernels take them: [batch, num_heads,
    seqlen, head_dim], where sequences are packed with a batch of 1."""

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    lengths: dict[str, Tensor] = field(default_factory=dict)  # and sinks
    options: Mapping[str, Any] = field(default_factory=dict)  # as error_report takes them
    cache: Cache | None = None

    @property
    def has_lengths(self) -> bool:
        """Return whether its sequences differ in length: then no gate shows a part of it."""
        return self.problem.varlen != "none"

    @property
    def is_packed(self) -> bool:
        """Return whether its queries are packed."""
        return self.problem.packs_queries

    def expected(self, plan: Plan) -> list[Expected]:
        """Return lse and out of sequences that differ in length."""
        if self.cache is not None:
            return paged_attention(self.problem, plan, self.cache)
        return packed_attention(self.problem, plan, self.q, self.k, self.v, self.lengths)


def call_of(case: Case | VarlenCase | PagedCase, device: str) -> Call:
    """Return the call of a case, with tensors on a device."""
    if isinstance(case, PagedCase):
        cache = make_paged_inputs(case, device)
        describe = packed_pages_problem if case.lengths_q else paged_problem
        problem = describe(cache.inputs(), Options.checked(**case.options()))
        tensors = cache.queries(), cache.k_pages, cache.v_pages, cache.tree_mask
        return Call(problem, *tensors, cache.others(), cache=cache)
    if isinstance(case, VarlenCase):
        packed = make_varlen_inputs(case, device)
        problem = packed_problem(*packed.arguments(), sinks=packed.sinks, **case.options())
        q, k, v = (as_batch(tensor) for tensor in (packed.q, packed.k, packed.v))
        return Call(problem, q, k, v, None, packed.others)
    x = make_inputs(case, device)
    wanted = Wanted(return_lse=True, return_max_score=case.return_max_score)._asdict()
    options = case.options() | {"sinks": x.sinks}
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, **wanted, **options)
    return Call(problem, x.q, x.k, x.v, x.mask, x.others, options)
