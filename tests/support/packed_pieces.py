"""Cases of packed sequences whose keys the device cuts into ranges, for both kernels."""

from __future__ import annotations

import dataclasses

from flashcore.backends.packed import packed_problem
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs
from flashcore.problem import Problem

# A piece of a prompt, no query, no key, decodes of which one has most of the keys.
COUNTS = (20, 0, 3, 1, 1)
LENGTHS = (70, 20, 0, 1500, 64)
CASE = VarlenCase(
    lengths_q=COUNTS, lengths_k=LENGTHS, num_heads_q=6, num_heads_kv=2, head_dim=32,
    head_dim_v=40, causal="lower_right", tail=3, sinks=True, seed=1,
)  # fmt: skip
CASES = [
    CASE,
    dataclasses.replace(CASE, num_heads_q=2, softcap=5.0, dtype="bfloat16", causal="none"),
    dataclasses.replace(CASE, num_heads_q=14, window=(900, 5), causal="none", sinks=False),
    dataclasses.replace(CASE, lengths_q=(1,), lengths_k=(1700,), tail=0),
]


def problem_of(case: VarlenCase) -> Problem:
    return packed_problem(*make_varlen_inputs(case).arguments(), **case.options())
