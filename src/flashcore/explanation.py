"""Explain how a call of `attention` would run, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TextIO

import torch

from flashcore.backends.adapting import adapt, kernel_for, rather_portable
from flashcore.backends.backward_sm90 import plans_for
from flashcore.backends.by_torch import sdpa_cpu, sdpa_gpu
from flashcore.backends.dispatch import KERNELS, adapt_for, choose_backend
from flashcore.backends.gradients import BackwardChoice, choose_backward
from flashcore.backends.growing import planned_as
from flashcore.backends.obstacles import KERNEL_DTYPES, WMMA_MIN_ARCH
from flashcore.base import env
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import BY_BACKEND, forward_for, forward_of
from flashcore.problem import Causal, Problem, Window
from flashcore.problem.memory_layout import load_bytes
from flashcore.problem.ranks import as_rank_4, has_other_rank
from flashcore.problem.spelling import OF_ATTENTION, other_names, refuse
from flashcore.problem.validation import HEAD_DIM_MAX
from flashcore.selection import tuned
from flashcore.selection.select import candidates

SHOWN_ALTERNATIVES = 3


@dataclass(frozen=True, slots=True)
class Explanation:
    """An Explanation holds what `explain` found; `str()` is what it prints.

    Args:
        problem: the call, validated and normalised.
        backend: "sm90", "wmma", "sim" or "torch"; "meta" for tensors without values.
        reason: why that backend.
        plan: the kernel and its tiles; for "torch" on float16 or bfloat16 CPU tensors, what a GPU
            of the architecture would run; None where no kernel serves the call.
        alternatives: the next best tile configurations, in order.
        notes: what else decided, a sentence each.
        gradient: the code that computes the gradient, if one is asked for through out alone.
        gradient_plans: the kernels of ours that do, in order, and their tiles.
        gradient_notes: where those tiles come from.
    """

    problem: Problem
    backend: str
    reason: str
    plan: Plan | None
    alternatives: tuple[Plan, ...]
    notes: tuple[str, ...]
    gradient: BackwardChoice
    gradient_plans: tuple[Plan, ...] = ()
    gradient_notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"problem   {self.problem.describe()}",
            f"backend   {self.backend}: {self.reason}",
        ]
        if self.plan is not None:
            label = "on a GPU" if self.backend == "torch" else "kernel"
            lines.append(f"{label:<8}  {self.plan.describe()}")
            lines.append(f"tiles     {_tiles(self.plan)}  <- chosen")
            lines += [f"          {_tiles(plan)}" for plan in self.alternatives]
        lines += [f"note      {note}" for note in self.notes]
        lines.append(f"gradient  {self.gradient.code}: {self.gradient.reason}")
        lines += [f"          {_tiles(plan)}  {plan.kernel}" for plan in self.gradient_plans]
        lines += [f"note      {note}" for note in self.gradient_notes]
        return "\n".join(lines)


@other_names(OF_ATTENTION)
def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    return_max_score: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
    arch: int | None = None,
    file: TextIO | None = None,
    **_unknown: object,
) -> Explanation:
    """Print which backend, kernel and tile configuration `attention` would use, and why.

    Nothing is computed or compiled.

    Args:
        q: as in `attention`, like all the arguments that follow.
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        causal: False, True (aligned at the lower right) or "upper_left".
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        mask: boolean (True = attend) or additive, broadcast to the scores; or None.
        sinks: [num_heads_q], a logit of each head that joins the softmax; or None.
        return_lse: whether the log-sum-exp of each row of scores is returned too.
        return_max_score: whether the largest score of each head is returned too.
        deterministic: whether gradients have the same bits in every run.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        arch: GPU architecture to plan for, 90 for sm_90; by default that of q's device, and what
            the simulator runs for CPU tensors.
        file: where to print; by default standard output.

    Returns:
        The same as an object.

    Raises:
        Exception: what `attention` would raise for these arguments.
    """
    if _unknown:
        refuse(explain, _unknown)
    if arch is not None and (type(arch) is not int or arch < WMMA_MIN_ARCH):
        raise ValueError(f"arch={arch!r} is no architecture; pass 90 for sm_90, 75 at least")
    if file is not None and not hasattr(file, "write"):
        raise TypeError(f"file must be open for writing text, or None, but is {file!r}")
    ranked = has_other_rank(q, k, v)
    if ranked:
        q, k, v, mask, _, _ = as_rank_4(q, k, v, mask)
    problem = Problem.from_tensors(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        mask=mask,
        sinks=sinks,
        return_lse=return_lse,
        return_max_score=return_max_score,
        deterministic=deterministic,
    )
    choice = choose_backend(problem, backend)
    # Of the gradient the same is asked: what would that GPU take?
    trained, training_backend = problem, backend
    if arch is not None:
        trained = replace(problem, device="cuda", arch=arch)
        training_backend = "auto" if backend == "sim" else backend
    plans: list[Plan] = []
    notes = [*adapt_for(choice.backend, problem).notes]
    adapted = None
    if _has_kernel(problem) and (
        choice.backend not in ("torch", "meta") or problem.device == "cpu"
    ):
        arch = arch or problem.arch or env.sim_arch()
        kernel = choice.backend if choice.backend in KERNELS else kernel_for(problem, arch)
        adapted = adapt(problem, kernel)
        plans = candidates(planned_as(adapted.problem), arch, kernel=BY_BACKEND[kernel].name)
        where = "on a GPU " if choice.backend == "torch" else ""
        notes = [where + note for note in adapted.notes]
        notes += _notes_choice(problem, choice.backend, kernel, arch)
    found = tuned.find(planned_as(adapted.problem), plans[0]) if adapted and plans else None
    if found is not None:
        plans = [found.plan, *(plan for plan in plans if plan != found.plan)]
    gradient = choose_backward(
        trained,
        mask_grad_elements=mask.numel() if mask is not None and mask.requires_grad else 0,
        backend=training_backend,
    )
    gradient_plans, gradient_notes = _gradient_plans(trained, gradient)
    explanation = Explanation(
        problem=problem,
        backend=choice.backend,
        reason=choice.reason,
        plan=plans[0] if plans else None,
        alternatives=tuple(plans[1 : 1 + SHOWN_ALTERNATIVES]),
        notes=(
            *(
                [f"q, k and v are taken as [{problem.batch}, ...], of four dimensions"]
                if ranked
                else ()
            ),
            *_notes_torch(problem, choice.backend),
            *notes,
            *(_notes_plan(problem, adapted.problem, plans[0], found, q, k, v) if adapted else ()),
        ),
        gradient=gradient,
        gradient_plans=gradient_plans,
        gradient_notes=gradient_notes,
    )
    print(explanation, file=file)
    return explanation


def _gradient_plans(
    problem: Problem, gradient: BackwardChoice
) -> tuple[tuple[Plan, ...], tuple[str, ...]]:
    """Return the backward kernels of ours that a choice runs, and where their tiles come from."""
    if not gradient.is_fused or problem.is_empty:
        return (), ()
    plans = tuple(plans_for(problem))
    notes = {
        f"{plan.kernel}: {found.source}": None
        for plan in plans
        if plan.is_persistent and (found := tuned.find(problem, plan)) is not None
    }
    return plans, tuple(notes) or ("tiles of the gradient go by rules (docs/backward.md)",)


def _has_kernel(problem: Problem) -> bool:
    dims = problem.head_dim, problem.head_dim_v
    return problem.dtype in KERNEL_DTYPES and max(dims) <= HEAD_DIM_MAX


def _tiles(plan: Plan) -> str:
    """Return the numbers by which tile configurations are ranked, in aligned columns."""
    return (
        f"{plan.block_m:>3} x {plan.block_n:<3}  {plan.num_warps} warps  {plan.num_stages} stages  "
        f"{plan.smem_bytes:>6} B shared  {plan.min_blocks * plan.num_warps} warps/SM"
    )


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
        if sdpa_cpu.means_the_same(problem):
            how = "by torch's SDPA, which means the same here"
        elif sdpa_gpu.means_the_same(problem):
            how = "by torch's SDPA, unless that would store too many scores"
        notes.append(f"computed {how}; memory is linear in seqlen")
    return notes


def _notes_plan(
    problem: Problem,
    given: Problem,
    plan: Plan,
    found: tuned.Found | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
            for name, x in (("q", q), ("k", k), ("v", v))
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
