"""Choose the Plan of a Problem: which kernel runs, with which tiles. Pure functions, no GPU needed.

Selection is enumerate, filter for legality, rank: `candidates` lists every legal tile configuration
of a problem on an architecture, best first by rules, and `select_plan` takes the first, unless
measurements know better (selection/tuned.py, selection/tile_table.py).
"""

from __future__ import annotations

from flashcore.kernels import registry
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH, Plan
from flashcore.problem import Problem
from flashcore.problem.validation import HEAD_DIM_MAX, HEAD_DIM_MULTIPLE
from flashcore.selection import tuned


def candidates(
    problem: Problem,
    arch: int | None = None,
    gate: str | None = None,
    kernel: str | None = None,
) -> list[Plan]:
    """Return every legal tile configuration for the problem, best first.

    Args:
        problem: what is asked.
        arch: architecture to plan for (90 for sm_90); by default the problem's own, and
            `SIM_ARCH` for CPU tensors.
        gate: debug gate to build in, one of the kernel's `gates`.
        kernel: name of a forward kernel; by default the one that is preferred on the architecture
            (kernels/registry.py), or where that does not serve the problem, the portable one.

    Raises:
        ValueError: there is no such kernel, or it has no such gate.
        NotImplementedError: no kernel reads such tensors as they lie; see backends/adapting.py.
    """
    if not problem.is_readable or max(problem.head_dim, problem.head_dim_v) > HEAD_DIM_MAX:
        raise NotImplementedError(
            f"no kernel reads {problem.describe()} in place; the kernels read contiguous rows of a "
            f"multiple of {HEAD_DIM_MULTIPLE} elements up to {HEAD_DIM_MAX}: give them padded "
            "copies, as flashcore.attention does"
        )
    arch = arch or problem.arch or SIM_ARCH
    if kernel is not None:
        chosen = registry.forward(kernel)
    else:
        chosen = registry.forward_for(arch)
        if chosen.obstacle(problem):
            chosen = registry.PORTABLE
    return chosen.candidates(problem, arch, gate) or registry.PORTABLE.candidates(
        problem, arch, gate
    )


def select_plan(
    problem: Problem,
    arch: int | None = None,
    gate: str | None = None,
    kernel: str | None = None,
) -> Plan:
    """Return what was measured for such problems, by `flashcore tune` on this GPU or for the table
    that ships, or else the best by the rules. See `candidates`."""
    best = candidates(problem, arch, gate, kernel)[0]
    found = measured(problem, best)
    return best if found is None else found.plan


def measured(problem: Problem, best: Plan) -> tuned.Found | None:
    """Return what was measured for such problems, given the best plan by the rules; None where
    nothing was, or the batch, on which it depends, must not decide."""
    return None if problem.batch_invariant else tuned.find(problem, best)
