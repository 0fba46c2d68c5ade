"""Run the backward kernels for Hopper stage by stage and name the first stage that is wrong.

delta, dS, dV, dK and dQ are stages with a debug gate each: it stops behind the stage or shows its
result, or replaces what goes into it, so that each is judged by itself
(kernels/bwd_sm90/stages.py). Then all kernels run as they are. Every result is compared with its
float64 model (isolate/gradient_model.py). Alarms count, as they do in the stages of a forward
kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.checks.planned import compile_planned
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.errors import BackendUnavailableError, CompileError, FlashCoreError
from flashcore.isolate.alarms import from_compile_error, from_error
from flashcore.isolate.backward_calls import BackwardCall, Part, backward_call
from flashcore.isolate.diagnosis import verdict
from flashcore.isolate.gradient_model import GradientModel
from flashcore.isolate.isolation import Isolation, StageResult
from flashcore.isolate.locate import Check, compare
from flashcore.kernels.bwd_sm90.kernel import DKDV, DQ
from flashcore.kernels.bwd_sm90.plan import (
    ARCH,
    DKDV_KERNEL,
    BwdPlans,
    BwdSm90Plan,
    obstacle,
    obstacle_anywhere,
    select_plans,
)
from flashcore.kernels.bwd_sm90.plan_one import (
    OneKernelPlans,
    in_any_order,
    select_one_kernel_plans,
)
from flashcore.kernels.bwd_sm90.plan_one import obstacle as obstacle_to_one_kernel
from flashcore.kernels.bwd_sm90.stages import STAGES
from flashcore.kernels.stage import Stage
from flashcore.problem import Problem
from flashcore.problem.case import Case

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant


_KERNELS = {kernel.name: kernel for kernel in (DQ, DKDV)}
_SHOWN = ("delta", "dq", "dv", "dk")


def isolate_backward(
    case: Case | VarlenCase,
    kernel: str = DKDV_KERNEL,
    *,
    backend: str = "sim",
    seed: int = 0,
    plant: Plant | None = None,
    arch: int | None = None,
    tile: Mapping[str, Any] | None = None,
    tiles: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
    arrives: str = "both",
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Isolation:
    """Run all stages of the backward pass of one case and find the first wrong one.

    Args:
        case: shape and options, of a batch, a padded one (PaddedCase) or packed sequences; its
            tensors must not be empty.
        kernel: the one that `plant` and `tile` belong to.
        backend: "sim", or "sm90" for the GPU.
        seed: seed of the simulator's scheduler.
        plant: bug to plant in that kernel (simulator only), or None.
        arch: must be 90 or None.
        tile: fields of that kernel's plan, with `also_dq` for dq, dk and dv by one kernel, and
            without `ordered` for sums of dq in any order; the others, and those of other kernels,
            are chosen as for any call.
        tiles: fields of the plan of the kernel of dq and of that of dk and dv, instead of `tile`.
        arrives: where a gradient arrives: "out", "lse" or "both".
        on_stage: called before each stage.

    Returns:
        All stages and the verdict. Where a kernel does not compile, nothing is run behind the first
        stage.

    Raises:
        ValueError: an empty case, or a dtype, a case, a tile or an architecture that the kernels do
            not take.
    """
    call = backward_call(case, "cpu" if backend == "sim" else "cuda", arrives)
    wanted = {kernel: dict(tile or {})}
    if tiles is not None:
        wanted = dict(zip(_KERNELS, map(dict, tiles), strict=True))
        wanted[kernel] |= {} if plant is None else dict(plant.plan)
    also_dq = bool(wanted.get(DKDV_KERNEL, {}).get("also_dq"))
    _check(call.problem, kernel, backend, arch, also_dq)
    bugs = {} if plant is None else {kernel: plant}
    runner = _Runner(call, seed, bugs, _launches(call, _plans_of(call.problem, wanted, also_dq)))
    results: list[StageResult] = []
    is_over = False
    for stage in STAGES:
        on_stage(stage)
        if is_over:
            results.append(StageResult(stage.name, stage.title, "", "not run"))
            continue
        found = runner.run(stage)
        results.append(found)
        # A CUDA error is sticky: nothing runs in this process any more.
        is_over = found.status == "alarm" and backend != "sim"
        is_over |= found.status == "not compiled" and not runner.compiles()
    first_wrong, why = verdict(results, kernel)
    name = None if plant is None else plant.name
    return Isolation(
        case, backend, kernel, seed, name, wanted[kernel], first_wrong, tuple(why), tuple(results)
    )


def _check(problem: Problem, kernel: str, backend: str, arch: int | None, also_dq: bool) -> None:
    """Raise ValueError unless the kernels take the problem."""
    reason = obstacle_anywhere(problem) if backend == "sim" else obstacle(problem)
    if also_dq:
        reason = reason or obstacle_to_one_kernel(problem)
    if arch not in (None, ARCH):
        reason = f"it runs on sm_{ARCH} alone, not on sm_{arch}"
    if reason is not None:
        raise ValueError(f"{kernel} does not take {problem.describe()}: {reason}")


def _plans_of(
    problem: Problem, wanted: Mapping[str, Mapping[str, Any]], also_dq: bool
) -> BwdPlans | OneKernelPlans:
    # As the tensors will be, whose rows are padded to whole packets.
    dims = {name: -(-getattr(problem, name) // 8) * 8 for name in ("head_dim", "head_dim_v")}
    padded = dataclasses.replace(problem, **dims)
    select = select_one_kernel_plans if also_dq else select_plans
    plans: BwdPlans | OneKernelPlans = select(padded)
    if isinstance(plans, OneKernelPlans) and not wanted.get(DKDV_KERNEL, {}).get("ordered", True):
        plans = in_any_order(plans)
    own: dict[str, Any] = {
        name: _KERNELS[plan.kernel].with_tile(plan, wanted[plan.kernel])
        for name, plan in plans._asdict().items()
        if plan.kernel in wanted
    }
    return plans._replace(**own)


class _Launch(NamedTuple):
    """A launch holds what one kernel is run with; all of a pass share their tensors."""

    problem: Problem
    plan: BwdSm90Plan
    tensors: dict[str, Tensor]

    def under(self, gate: str) -> _Launch:
        """Return the launch of the kernel with a debug gate."""
        return self._replace(plan=dataclasses.replace(self.plan, gate=gate))


def _launches(call: BackwardCall, plans: BwdPlans | OneKernelPlans) -> list[_Launch]:
    """Return the launches of a pass, none of which is made."""
    made: list[_Launch] = []

    def keep(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
        made.append(_Launch(problem, plan, tensors))

    is_packed = call.problem.varlen == "packed"
    lse, dlse = (x[0] if is_packed else x for x in (call.lse, call.dlse))
    fused_backward(
        call.problem, call.q, call.k, call.v, call.mask, call.out, lse,
        None if call.arrives == "lse" else call.dout, None if call.arrives == "out" else dlse,
        keep, plans, call.lengths,
    )  # fmt: skip
    return made


@dataclass(slots=True)
class _Runner:
    call: BackwardCall
    seed: int
    plants: Mapping[str, Plant]  # by kernel
    launches: list[_Launch]
    last: BwdSm90Plan | None = None  # that was run

    def run(self, stage: Stage) -> StageResult:
        """Run one stage and judge it. The stage of dS has a run for each kernel that computes
        it."""
        start = time.perf_counter()
        checks: list[Check] = []
        steps = self._steps(stage)
        alarm, status = None, "ok"
        try:
            for check in self._checks(steps, is_given=stage.gate is not None):
                checks.append(check)
                status = status if check.ok else "wrong"
        except BackendUnavailableError:
            raise
        except CompileError as error:
            alarm, status = from_compile_error(error), "not compiled"
        except (FlashCoreError, torch.AcceleratorError) as error:
            assert self.last is not None
            plant = self.plants.get(self.last.kernel)
            alarm, status = from_error(error, self.call.problem, self.last, plant), "alarm"
        plans = "; ".join(launch.plan.describe() for launch, _ in steps)
        took = time.perf_counter() - start
        return StageResult(
            stage.name, stage.title, plans, status, tuple(checks), alarm, seconds=took
        )

    def compiles(self) -> bool:
        """Return whether the kernels themselves compile, which a gate of them may not."""
        try:
            for _, plan, _ in self.launches:
                compile_planned(plan, self.call.q.is_cuda, self.plants.get(plan.kernel))
        except CompileError:
            return False
        return True

    def _steps(self, stage: Stage) -> list[tuple[_Launch, tuple[str, ...]]]:
        """Return what a stage runs, and what of it is looked at."""
        first, last = self.launches[0], self.launches[-1]
        main = next(launch for launch in self.launches if launch.plan.owns_keys)
        if stage.gate is None:
            return [(x, tuple(n for n in _SHOWN if n in x.plan.written)) for x in self.launches]
        if main.plan.also_dq:
            if stage.gate == "delta":
                return [(first, ("delta",))]  # it computes nothing else
            if stage.gate == "dq":
                return [(main.under("dq"), ()), (last, ("dq",))]
            return [(main.under(stage.gate), (stage.gate,))]
        by_gate = {"delta": [first], "ds": [first, main], "dv": [main], "dk": [main], "dq": [first]}
        return [(x.under(stage.gate), (stage.gate,)) for x in by_gate[stage.gate]]

    def _checks(
        self, steps: list[tuple[_Launch, tuple[str, ...]]], is_given: bool
    ) -> Iterator[Check]:
        models = self.call.models(self.launches[0].plan)
        for launch, names in steps:
            self._set(launch, models)
            self._start(launch)
            for name in names:
                yield self._compared(launch, name, models, is_given)

    def _set(self, launch: _Launch, models: list[tuple[Part, GradientModel]]) -> None:
        """Fill what a kernel is given by its gate, and with NaN what it writes."""
        tensors, gate = launch.tensors, launch.plan.gate
        for name in launch.plan.written:
            tensors[name].fill_(math.nan if tensors[name].is_floating_point() else -1)
        tensors.pop("gate_scores", None)
        if "delta_count" in tensors and not launch.plan.owns_keys:
            tensors["delta_count"].zero_()
        if gate is None:
            return
        if launch.plan.owns_keys:
            delta = self.call.assembled("delta", [(part, x.delta()) for part, x in models])
            tensors["delta"].copy_(delta.value.reshape(tensors["delta"].shape))
            if "delta_count" in tensors:  # as the kernel of dq would have left it
                tensors["delta_count"].copy_(torch.tensor([delta.value.numel(), 0]))
        for name in ("dq_sums", "dq_turns"):
            if name in tensors:
                tensors[name].zero_()
        given = self.call.given(gate, models) if gate in ("dv", "dk", "dq") else None
        if given is None:
            given = torch.full((*self.call.lse.shape, self.call.longest_k), math.nan)
        tensors["gate_scores"] = given.to(self.call.q.device)

    def _start(self, launch: _Launch) -> None:
        """Run a kernel where its tensors are, and wait for it."""
        self.last = launch.plan
        if self.call.q.is_cuda:
            from flashcore.backends.backward_sm90 import run_on_gpu

            run_on_gpu(*launch)
            torch.cuda.synchronize()
            return
        from flashcore.sim.run_bwd import simulate_backward

        plant = self.plants.get(launch.plan.kernel)
        simulate_backward(*launch, seed=self.seed, plant=plant)

    def _compared(
        self,
        launch: _Launch,
        name: str,
        models: list[tuple[Part, GradientModel]],
        is_given: bool,
    ) -> Check:
        """Compare what a kernel wrote with the model, of P or dS as it `is_given` or its own."""
        plan = launch.plan
        of = {"delta": GradientModel.delta, "ds": GradientModel.ds}.get(
            name, functools.partial(GradientModel.gradient, name=name, is_given=is_given)
        )
        expected = self.call.assembled(name, [(part, of(model)) for part, model in models])
        actual = launch.tensors["gate_scores" if name == "ds" else name]
        kind = {"delta": "rows", "dq": "out"}.get(name, "keys")
        if kind != "rows":
            actual = actual[..., : expected.value.shape[-1]]  # what follows is padding
        if name == "ds":
            kind = "transposed" if plan.owns_keys else "scores"
            expected = dataclasses.replace(expected, name=f"ds of {plan.kernel}")
        actual = actual.reshape(expected.value.shape)  # delta of packed sequences has no batch
        return compare(actual, expected, plan, kind, plan.warps_of(name))
