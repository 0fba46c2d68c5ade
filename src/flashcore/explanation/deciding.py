"""Find out how a call would run, given its Problem: by the functions that decide when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from flashcore.backends.adapting import adapt, kernel_for, rather_portable
from flashcore.backends.by_torch import sdpa_cpu, sdpa_gpu
from flashcore.backends.dispatch import (
    KERNELS,
    adapt_for,
    choose_backend,
    resolved,
)
from flashcore.backends.growing import planned_as
from flashcore.backends.obstacles import KERNEL_DTYPES, fallback_text
from flashcore.base import env
from flashcore.explanation.found import Explanation
from flashcore.explanation.gradient import Gradient
from flashcore.kernels.append.params import AppendPlan
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import BY_BACKEND, forward_for, forward_of
from flashcore.problem import Problem
from flashcore.problem.memory_layout import load_bytes
from flashcore.problem.validation import HEAD_DIM_MAX
from flashcore.selection import tuned
from flashcore.selection.select import candidates, measured

SHOWN_ALTERNATIVES = 3

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def explained(
    problem: Problem,
    tensors: Tensors,
    backend: str,
    arch: int | None,
    gradient: Gradient,
    *,
    on_gpu: Problem | None = None,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    append: AppendPlan | None = None,
) -> Explanation:
    """Return which backend, kernel and tiles a call gets.

    Args:
        problem: the description of the call.
        tensors: q, k and v, of four dimensions, as the problem describes them.
        backend: as it was asked for.
        arch: GPU architecture to plan for; None: as in `explain`.
        gradient: what is said of it.
        on_gpu: the call of CPU tensors as a GPU would be given it, where that is another.
        notes: what the caller has to say of the call.
        warnings: those that the call gives besides that of its backend.
        append: the kernel that writes new tokens.
    """
    choice = choose_backend(problem, backend)
    fallbacks = [choice] if choice.is_fallback else []
    given, found, plans = None, None, list[Plan]()
    kernel = choice.backend if choice.backend in KERNELS and not problem.is_empty else None
    decided = [*adapt_for(choice.backend, problem).notes]
    if _has_kernel(problem) and kernel is None and choice.backend != "meta":
        is_asked, arch = arch is not None, arch or problem.arch or env.sim_arch()
        if choice.backend == "sim":
            kernel = kernel_for(problem, arch)
        elif problem.device == "cpu":
            there = resolved(replace(on_gpu or problem, device="cuda", arch=arch), "auto")
            kernel = there.backend if there.backend in KERNELS else None
            if kernel is None:
                decided = [f"on an sm_{arch} GPU PyTorch computes it, too: {there.reason}"]
                fallbacks += [there] if is_asked and backend != "torch" else []
    if kernel is not None:
        arch = arch or problem.arch
        asked = problem if on_gpu is None or choice.backend == "sim" else on_gpu
        adapted = adapt(asked, kernel)
        given = adapted.problem
        planned = planned_as(given)
        plans = candidates(planned, arch, kernel=BY_BACKEND[kernel].name)
        where = "on a GPU " if choice.backend == "torch" else ""
        decided = [where + note for note in adapted.notes]
        decided += _notes_choice(asked, choice.backend, kernel, arch)
        found = measured(planned, plans[0])
        if found is not None:
            plans = [found.plan, *(plan for plan in plans if plan != found.plan)]
        decided += _notes_plan(asked, given, plans[0], found, tensors)
    return Explanation(
        problem=problem,
        backend=choice.backend,
        reason=choice.reason,
        plan=plans[0] if plans else None,
        alternatives=tuple(plans[1 : 1 + SHOWN_ALTERNATIVES]),
        notes=(*notes, *_notes_torch(problem, choice.backend), *decided),
        gradient=gradient.choice,
        gradient_plans=gradient.plans,
        gradient_notes=gradient.notes,
        append=append,
        warnings=(*warnings, *(fallback_text(fallback.reason) for fallback in fallbacks)),
    )


def _has_kernel(problem: Problem) -> bool:
    dims = problem.head_dim, problem.head_dim_v
    is_served = problem.dtype in KERNEL_DTYPES and max(dims) <= HEAD_DIM_MAX
    return is_served and not problem.is_empty


def _notes_choice(problem: Problem, backend: str, kernel: str, arch: int) -> list[str]:
    """Return why not the architecture's own kernel, where Choice does not say so: for CPU
    tensors."""
    preferred = forward_for(arch)
    if backend in KERNELS or kernel == preferred.backend:
        return []
    return [f"not by {preferred.title}: {rather_portable(problem, preferred)}"]


def _notes_torch(problem: Problem, backend: str) -> list[str]:
    notes = []
    if problem.is_empty:
        lse = "the sink" if problem.has_sinks else "-inf"
        notes.append(f"there is nothing to compute: the result is 0, lse {lse}, without a kernel")
    if backend == "torch":
        how = "tile by tile"
        if problem.varlen != "none":
            how = "sequence by sequence, tile by tile, for which the host reads the lengths"
        elif sdpa_cpu.means_the_same(problem):
            how = "by torch's SDPA, which means the same here"
        elif sdpa_gpu.means_the_same(problem):
            how = "by torch's SDPA, unless that would store too many scores"
        notes.append(f"computed {how}; memory is linear in seqlen")
    return notes


def _notes_plan(
    problem: Problem, given: Problem, plan: Plan, found: tuned.Found | None, tensors: Tensors
) -> list[str]:
    """Return what decided about a plan, of a problem as it was asked and as the kernel is given
    it."""
    notes = []
    if found is not None:
        notes.append(found.source)
    else:
        notes.append(forward_of(plan).rules)
    if given.load_bytes < 16:
        narrow = [
            f"{name} allows {load_bytes(x)}"
            for name, x in zip("qkv", tensors, strict=True)
            if name in given.misaligned
        ]
        notes.append(
            f"loads are {given.load_bytes} bytes wide instead of 16, for alignment: "
            + ", ".join(narrow)
        )
    if plan.folds_heads:
        folded, group = plan.folds_heads, given.group_size
        which = f"{folded} heads" if folded == group else f"{folded} of the {group} heads"
        notes.append(f"{which} of q that share one of k and v are rows of one row tile")
    notes += forward_of(plan).notes(given, plan)
    if problem.causal != "none" and problem.window_right == -1:
        notes.append("causality hides no key at these lengths, so the kernel does not test for it")
    return notes
