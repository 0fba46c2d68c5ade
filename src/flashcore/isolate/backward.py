"""Run the backward kernels for Hopper in the simulator and name the first wrong tensor.

They have no debug gates: each of delta, dq, dv and dk is a stage, in the order in which they are
written, compared with its float64 model
(isolate/gradient_model.py). Alarms count, as they do in the stages of a forward kernel.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.errors import BackendUnavailableError, CompileError, FlashCoreError
from flashcore.isolate.alarms import from_compile_error, from_error
from flashcore.isolate.backward_calls import BackwardCall, backward_call
from flashcore.isolate.diagnosis import verdict
from flashcore.isolate.isolation import Isolation, StageResult
from flashcore.isolate.locate import compare
from flashcore.kernels.bwd_sm90.kernel import DKDV, DQ
from flashcore.kernels.bwd_sm90.plan import (
    ARCH,
    BwdPlans,
    BwdSm90Plan,
    obstacle_anywhere,
    select_plans,
)
from flashcore.kernels.bwd_sm90.plan_one import OneKernelPlans, select_one_kernel_plans
from flashcore.kernels.bwd_sm90.plan_one import obstacle as obstacle_to_one_kernel
from flashcore.kernels.bwd_sm90.stages import STAGES
from flashcore.kernels.stage import Stage
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim.run_bwd import simulate_backward

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant


_KERNELS = {kernel.name: kernel for kernel in (DQ, DKDV)}


def isolate_backward(
    case: Case | VarlenCase,
    kernel: str,
    *,
    seed: int = 0,
    plant: Plant | None = None,
    arch: int | None = None,
    tile: Mapping[str, Any] | None = None,
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Isolation:
    """Run the backward kernels on one case, in the simulator, and find the first wrong tensor.

    Args:
        case: shape and options, of a batch, a padded one (PaddedCase) or packed sequences; its
            tensors must not be empty.
        kernel: the one that `plant` and `tile` belong to.
        seed: seed of the simulator's scheduler.
        plant: bug to plant in that kernel, or None.
        arch: must be 90 or None.
        tile: fields of that kernel's plan, with `also_dq` for dq, dk and dv by one kernel; the
            others, and those of other kernels, are chosen as for any call.
        on_stage: called before each stage.

    Returns:
        All stages and the verdict. Behind an alarm nothing is run.

    Raises:
        ValueError: an empty case, or a dtype, a case, a tile or an architecture that the kernels do
            not take.
    """
    call = backward_call(case)
    _check(call.problem, kernel, arch, bool((tile or {}).get("also_dq")))
    results: list[StageResult] = []

    def run(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
        own = plant if plan.kernel == kernel else None
        is_over = any(result.status not in ("ok", "wrong") for result in results)
        stages = [stage for stage in STAGES if stage.name in plan.written]
        for stage in stages[:1]:
            on_stage(stage)
        if is_over:
            results.extend(StageResult(x.name, x.title, "", "not run") for x in stages)
        else:
            results.extend(_run(call._replace(problem=problem), plan, stages, tensors, seed, own))

    is_packed = call.problem.varlen == "packed"
    lse, dlse = (x[0] if is_packed else x for x in (call.lse, call.dlse))
    plans = _plans_of(call.problem, kernel, tile or {})
    fused_backward(
        call.problem, call.q, call.k, call.v, call.mask, call.out, lse, call.dout, dlse,
        run, plans, call.lengths,
    )  # fmt: skip
    first_wrong, why = verdict(results, kernel)
    name = None if plant is None else plant.name
    return Isolation(
        case, "sim", kernel, seed, name, tile or {}, first_wrong, tuple(why), tuple(results)
    )


def _check(problem: Problem, kernel: str, arch: int | None, also_dq: bool) -> None:
    """Raise ValueError unless the kernels take the problem."""
    reason = obstacle_to_one_kernel(problem) if also_dq else obstacle_anywhere(problem)
    if arch not in (None, ARCH):
        reason = f"it runs on sm_{ARCH} alone, not on sm_{arch}"
    if reason is not None:
        raise ValueError(f"{kernel} does not take {problem.describe()}: {reason}")


def _plans_of(problem: Problem, kernel: str, tile: Mapping[str, Any]) -> BwdPlans | OneKernelPlans:
    # As the tensors will be, whose rows are padded to whole packets.
    dims = {name: -(-getattr(problem, name) // 8) * 8 for name in ("head_dim", "head_dim_v")}
    padded = dataclasses.replace(problem, **dims)
    select = select_one_kernel_plans if tile.get("also_dq") else select_plans
    plans: BwdPlans | OneKernelPlans = select(padded)
    own: dict[str, Any] = {
        name: _KERNELS[kernel].with_tile(plan, tile)
        for name, plan in plans._asdict().items()
        if plan.kernel == kernel
    }
    return plans._replace(**own)


def _run(
    call: BackwardCall, plan: BwdSm90Plan, stages: Sequence[Stage], tensors: dict[str, Tensor],
    seed: int, plant: Plant | None,
) -> list[StageResult]:  # fmt: skip
    """Run one of the kernels and judge the tensors that it writes."""
    title = plan.describe()
    for stage in stages:
        tensors[stage.name].fill_(math.nan)
    start = time.perf_counter()
    alarm, status = None, "ok"
    try:
        simulate_backward(call.problem, plan, tensors, seed=seed, plant=plant)
    except BackendUnavailableError:
        raise
    except CompileError as error:
        alarm, status = from_compile_error(error), "not compiled"
    except FlashCoreError as error:
        alarm, status = from_error(error, call.problem, plan, plant), "alarm"
    took = time.perf_counter() - start
    if alarm is not None:
        first, *others = stages
        stopped = StageResult(first.name, first.title, title, status, alarm=alarm, seconds=took)
        return [stopped, *(StageResult(x.name, x.title, "", "not run") for x in others)]
    expectations = call.expected(plan)
    found = []
    for stage in stages:
        expected = expectations[stage.name]
        kind = {"delta": "rows", "dq": "out"}.get(stage.name, "keys")
        actual = tensors[stage.name]
        if kind != "rows":
            actual = actual[..., : expected.value.shape[-1]]  # what follows is padding
        actual = actual.reshape(expected.value.shape)  # delta of packed sequences has no batch
        check = compare(actual, expected, plan, kind, plan.warps_of(stage.name))
        status = "ok" if check.ok else "wrong"
        found.append(StageResult(stage.name, stage.title, title, status, (check,), seconds=took))
    return found
