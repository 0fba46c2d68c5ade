"""Say what a workload runs without tuning: the plan that a search starts from and compares with."""

from __future__ import annotations

import dataclasses

import torch

from flashcore.backends.dispatch import KERNELS, choose_backend
from flashcore.bench.workloads import Workload
from flashcore.errors import BackendUnavailableError
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.kernels.bwd_sm90.plan import obstacle, select_plans
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection import tile_table
from flashcore.selection.select import candidates


def default_plan(
    workload: Workload, backend: str, arch: int, *, shipped: bool = True
) -> tuple[Problem, Plan]:
    """Return the workload as a Problem on a GPU of an architecture, and its plan.

    Args:
        workload: dense, not packed sequences.
        backend: "auto", "sm90" or "wmma".
        arch: 90 for sm_90.
        shipped: by the table that ships, where it has an answer; else by the rules.

    Raises:
        BackendUnavailableError, NotImplementedError, TypeError: no kernel serves it there.
    """

    problem = _problem_of(workload, arch)
    choice = choose_backend(problem, backend)
    if choice.backend not in KERNELS:
        raise BackendUnavailableError(f"{workload.name}: no kernel to tune: {choice.reason}")
    rules = candidates(problem, kernel=KERNELS[choice.backend])[0]
    found = tile_table.find(problem, rules) if shipped else None
    return problem, rules if found is None else found.plan


def default_backward_plans(workload: Workload, arch: int) -> tuple[Problem, list[Plan]]:
    """Return the workload as a Problem on a GPU of an architecture, and the plans of the backward
    kernels that have tiles: of dq, of dk and dv, and, where it takes the problem, of the kernel
    that computes all three.

    Raises:
        BackendUnavailableError: no backward kernel of ours serves it there.
    """
    problem = _problem_of(workload, arch)
    reason = obstacle(problem)
    if reason is not None:
        raise BackendUnavailableError(f"{workload.name}: no backward kernel to tune: {reason}")
    plans: list[Plan] = [*select_plans(problem)]
    if plan_one.obstacle(problem) is None:
        plans.append(plan_one.select_one_kernel_plans(problem).main)
    return problem, plans


def _problem_of(workload: Workload, arch: int) -> Problem:
    def empty(seqlen: int, heads: int) -> torch.Tensor:
        shape = (workload.batch, seqlen, heads, workload.head_dim)
        return torch.empty(shape, dtype=getattr(torch, workload.dtype)).transpose(1, 2)

    k = empty(workload.keys, workload.heads_kv)
    described = Problem.from_tensors(
        empty(workload.seqlen, workload.num_heads),
        k,
        k,
        causal=workload.causal,
        window=workload.window,
        softcap=workload.softcap,
        mask=workload.mask_tensor("cpu"),
    )
    return dataclasses.replace(described, device="cuda", arch=arch)
