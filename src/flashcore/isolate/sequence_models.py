"""Model what the kernels compute of sequences that differ in length, by a GateModel each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashcore.isolate.gate_models import Expected, GateModel

if TYPE_CHECKING:
    from flashcore.checks.paged_cases import Cache
    from flashcore.kernels.fwd_wmma.plan import Plan
    from flashcore.problem import Problem


def packed_attention(
    problem: Problem,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Mapping[str, Tensor],
) -> list[Expected]:
    """Return lse and out of packed sequences, each by a GateModel of its own.

    Args:
        problem: the call of `attention_varlen`.
        plan: as in GateModel.
        q: [1, num_heads_q, total_q, head_dim].
        k: [1, num_heads_kv, total_k, head_dim].
        v: [1, num_heads_kv, total_k, head_dim_v].
        lengths: cu_seqlens_q and cu_seqlens_k, by name, and sinks if there are any.

    Returns:
        lse [1, num_heads_q, total_q] and out [1, num_heads_q, total_q, head_dim_v]. Rows that
        belong to no sequence are those of one without keys.
    """
    # Clamped as the kernels do.
    begins_q = lengths["cu_seqlens_q"].clamp(0, problem.total_q).tolist()
    begins_k = lengths["cu_seqlens_k"].clamp(0, problem.total_k).tolist()
    begins_q.append(problem.total_q)
    begins_k.append(begins_k[-1])
    parts: list[list[Expected]] = []
    for queries, keys in zip(
        itertools.pairwise(begins_q), itertools.pairwise(begins_k), strict=True
    ):
        if queries[0] < queries[1]:
            own = problem.of_sequence(queries[1] - queries[0], keys[1] - keys[0])
            rows = q[:, :, slice(*queries)].nan_to_num()  # what lies behind the last one is NaN
            tensors = (rows, k[:, :, slice(*keys)], v[:, :, slice(*keys)])
            model = GateModel(own, plan, *tensors, None, lengths.get("sinks"))
            parts.append(model.attention())
    return _joined(parts, 2)


def paged_attention(problem: Problem, plan: Plan, cache: Cache) -> list[Expected]:
    """Return lse and out of a call with pages, each sequence by a GateModel of its own.

    Args:
        problem: the call of `attention_paged` or `attention_paged_varlen`.
        plan: as in GateModel.
        cache: what it was given.

    Returns:
        lse [batch, num_heads_q, seqlen_q] and out [batch, num_heads_q, seqlen_q, head_dim_v];
        where queries are packed as those of packed_attention.
    """
    parts = []
    for b, n in enumerate(cache.lengths):
        q, k, v = cache.sequence(b)
        own = problem.of_sequence(q.shape[2], n)
        parts.append(GateModel(own, plan, q, k, v, cache.mask(b)).attention())
    return _joined(parts, 2 if problem.packs_queries else 0)


def _joined(parts: list[list[Expected]], dim: int) -> list[Expected]:
    """Return what is expected of sequences as what is expected of the call that has them all."""
    return [
        Expected(
            of_sequences[0].name,
            torch.cat([part.value for part in of_sequences], dim),
            torch.cat([part.tolerance for part in of_sequences], dim),
        )
        for of_sequences in zip(*parts, strict=True)
    ]
