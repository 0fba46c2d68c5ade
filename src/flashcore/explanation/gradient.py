"""Say which code computes the gradient of a call, and by which kernels, for explanations."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from flashcore.backends.backward_sm90 import of_any_longest, plans_for
from flashcore.backends.gradients import BackwardChoice, choose_backward, computes_all
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.selection import tuned


class Gradient(NamedTuple):
    """Hold what an Explanation says of the gradient.

    Args:
        choice: the code that computes it.
        plans: the kernels of ours that do, in order.
        notes: where their tiles come from, and what else there is to know.
    """

    choice: BackwardChoice
    plans: tuple[Plan, ...] = ()
    notes: tuple[str, ...] = ()


def no_gradient(reason: str) -> Gradient:
    """Return what to say of a call that has no gradient."""
    return Gradient(BackwardChoice("none", reason))


def gradient_of(
    problem: Problem, backend: str, arch: int | None, mask_grad_elements: int = 0
) -> Gradient:
    """Return which code computes the gradient of a call.

    Args:
        problem: the description of the forward pass.
        backend: of the call.
        arch: the GPU that is asked about; None for the tensors' own device, or the simulator's.
        mask_grad_elements: as in `choose_backward`.
    """
    # A backward pass needs no sinks: they are part of lse.
    problem = dataclasses.replace(problem, has_sinks=False)
    if arch is not None:
        problem = dataclasses.replace(problem, device="cuda", arch=arch)
        backend = "auto" if backend == "sim" else backend
    choice = choose_backward(problem, mask_grad_elements=mask_grad_elements, backend=backend)
    notes: tuple[str, ...] = ()
    if problem.varlen != "none" and not computes_all(problem, choice):
        problem = problem.of_sequence(problem.seqlen_q, problem.seqlen_k)
        notes = (
            f"not all sequences at once: {choice.reason}; each is computed by itself, the longest "
            "possible one as above, and the host reads the lengths for that",
        )
        choice = choose_backward(problem, backend=backend)
    if not choice.is_fused or problem.is_empty:
        return Gradient(choice, (), notes)
    plans = tuple(plans_for(problem))
    seen = of_any_longest(problem)
    measured = {
        f"{plan.kernel}: {found.source}": None
        for plan in plans
        if plan.is_persistent and (found := tuned.find(seen, plan)) is not None
    }
    sources = tuple(measured) or ("tiles of the gradient go by rules (docs/backward.md)",)
    return Gradient(choice, plans, (*notes, *sources))
