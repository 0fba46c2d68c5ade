"""An Explanation is what `explain` and its kin found out about a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

from flashcore.backends.gradients import BackwardChoice
from flashcore.backends.obstacles import WMMA_MIN_ARCH
from flashcore.kernels.append.params import AppendPlan
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem


@dataclass(frozen=True, slots=True)
class Explanation:
    """An Explanation holds what `explain` found; `str()` is what it prints.

    Args:
        problem: the call, validated and normalised.
        backend: "sm90", "wmma", "sim" or "torch"; "meta" for tensors without values.
        reason: why that backend.
        plan: the kernel and its tiles; for "torch" on float16 or bfloat16 CPU tensors, what a GPU
            of the architecture would run; None where no kernel serves the call, or there is nothing
            to compute.
        alternatives: the next best tile configurations, in order.
        notes: what else decided, a sentence each.
        gradient: the code that computes the gradient, if one is asked for through out alone; its
            code is "none" where a call has no gradient.
        gradient_plans: the kernels of ours that do, in order, and their tiles.
        gradient_notes: where those tiles come from.
        append: the kernel that writes new tokens into a cache, for CPU tensors that of a GPU;
            None where there are none, or PyTorch's operations write them.
        warnings: the text of each FallbackWarning that the call gives, on a GPU of the architecture
            if one was asked for.
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
    append: AppendPlan | None = None
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"problem   {self.problem.describe()}",
            f"backend   {self.backend}: {self.reason}",
        ]
        label = "on a GPU" if self.backend == "torch" else "kernel"
        if self.plan is not None:
            lines.append(f"{label:<8}  {self.plan.describe()}")
            lines.append(f"tiles     {_tiles(self.plan)}  <- chosen")
            lines += [f"          {_tiles(plan)}" for plan in self.alternatives]
        if self.append is not None:
            where = " (on a GPU)" if self.backend == "torch" else ""
            lines.append(f"append    {self.append.describe()}{where}")
        lines += [f"note      {note}" for note in self.notes]
        lines += [f"warning   {text}" for text in self.warnings]
        lines.append(f"gradient  {self.gradient.code}: {self.gradient.reason}")
        lines += [f"          {_tiles(plan)}  {plan.kernel}" for plan in self.gradient_plans]
        lines += [f"note      {note}" for note in self.gradient_notes]
        return "\n".join(lines)

    def printed(self, file: TextIO | None) -> Explanation:
        """Print this, and return it."""
        print(self, file=file)
        return self


def _tiles(plan: Plan) -> str:
    """Return the numbers by which tile configurations are ranked, in aligned columns."""
    return (
        f"{plan.block_m:>3} x {plan.block_n:<3}  {plan.num_warps} warps  {plan.num_stages} stages  "
        f"{plan.smem_bytes:>6} B shared  {plan.min_blocks * plan.num_warps} warps/SM"
    )


def check_asked(arch: object, file: object) -> None:
    """Raise unless `arch` is an architecture or None, and `file` open for writing or None."""
    if arch is not None and (type(arch) is not int or arch < WMMA_MIN_ARCH):
        raise ValueError(f"arch={arch!r} is no architecture; pass 90 for sm_90, 75 at least")
    if file is not None and not hasattr(file, "write"):
        raise TypeError(f"file must be open for writing text, or None, but is {file!r}")
