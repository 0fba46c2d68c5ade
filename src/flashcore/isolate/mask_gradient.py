"""Run the kernel of an additive mask's gradient in the simulator, and compare it with its float64
model: the one stage that it has."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcore.backends.backward_sm90 import run_for_mask
from flashcore.backends.tiled import attention_tiled
from flashcore.checks.cases import make_inputs
from flashcore.errors import BackendUnavailableError, CompileError, FlashCoreError
from flashcore.isolate.alarms import from_compile_error, from_error
from flashcore.isolate.diagnosis import verdict
from flashcore.isolate.gate_models import UNIT_ROUNDOFF, Expected, GateModel
from flashcore.isolate.isolation import Isolation, StageResult
from flashcore.isolate.locate import Check, compare
from flashcore.kernels.bwd_mask_sm90.kernel import DMASK
from flashcore.kernels.bwd_mask_sm90.plan import MaskPlan, select_mask_plan
from flashcore.kernels.bwd_sm90.plan import obstacle_anywhere
from flashcore.kernels.stage import Stage
from flashcore.problem import Problem
from flashcore.problem.case import Case

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant

# Of a sum's terms, beside the rounding of the result: exponentials and two products in float32.
_ERROR = 1e-4


def isolate_mask_gradient(
    case: object,
    kernel: str,
    *,
    seed: int = 0,
    plant: Plant | None = None,
    arch: int | None = None,
    tile: Mapping[str, Any] | None = None,
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Isolation:
    """Run the kernel on one case.

    Args:
        case: a Case whose mask is "additive"; here its columns are rolled further with each head,
            and a row in the middle sees nothing. What arrives at such rows is NaN.
        kernel: its name.
        seed: seed of the simulator's scheduler.
        plant: bug to plant, or None.
        arch: must be 90 or None.
        tile: `num_shares`, the blocks that divide a sum; `sums_rows`: True for the first row of
            the mask alone, which all queries then share.
        on_stage: called before the stage.

    Raises:
        ValueError: another case, tile or architecture, or a dtype that the kernel does not take.
    """
    fields = {"num_shares": 1, "sums_rows": False} | dict(tile or {})
    if not isinstance(case, Case) or case.mask != "additive":
        raise ValueError(f'case={case!r} has no additive mask, which {kernel} is for: mask="..."')
    if arch not in (None, DMASK.only_arch) or len(fields) > 2:
        raise ValueError(f"{kernel} has no tile={dict(tile or {})!r} and runs on sm_90 alone")
    x = make_inputs(case)
    assert x.mask is not None
    mask = torch.cat([x.mask.roll(head, -1) for head in range(case.num_heads_q)], 1)
    mask[:, :, case.seqlen_q // 2] = -math.inf
    if fields["sums_rows"]:
        mask = mask[:, :, :1]
    problem = Problem.from_tensors(x.q, x.k, x.v, mask=mask, return_lse=True, **case.options())
    reason = obstacle_anywhere(problem, needs_mask_grad=True)
    if reason is not None:
        raise ValueError(f"{kernel} does not take {problem.describe()}: {reason}")
    out, lse = attention_tiled(problem, x.q, x.k, x.v, mask)
    generator = torch.Generator().manual_seed(case.seed)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    is_empty = lse == -math.inf
    delta = (dout.float() * out.float()).sum(-1).masked_fill(is_empty, 0.0)
    tensors = {
        "q": x.q, "k": x.k, "v": x.v, "out": out, "lse": lse, "delta": delta, "mask": mask,
        "dout": dout.masked_fill(is_empty[..., None], math.nan),
    }  # fmt: skip
    batch, heads, rows, keys = mask.shape
    plan = select_mask_plan(problem, (batch, heads, rows, keys))
    plan = dataclasses.replace(plan, num_shares=fields["num_shares"])
    (stage,) = DMASK.stages
    on_stage(stage)
    result = _run(problem, plan, tensors, dout, stage, seed, plant)
    first_wrong, why = verdict([result], kernel)
    name = None if plant is None else plant.name
    return Isolation(
        case, "sim", kernel, seed, name, tile or {}, first_wrong, tuple(why), (result,)
    )


def _run(
    problem: Problem, plan: MaskPlan, tensors: dict[str, Tensor], dout: Tensor, stage: Stage,
    seed: int, plant: Plant | None,
) -> StageResult:  # fmt: skip
    from flashcore.sim.run_bwd import simulate_backward

    def simulate(problem: Problem, plan: MaskPlan, tensors: dict[str, Tensor]) -> None:
        simulate_backward(problem, plan, tensors, seed=seed, plant=plant)

    found = torch.full(plan.shape(problem), math.nan, dtype=tensors["mask"].dtype)
    start = time.perf_counter()
    alarm, status = None, "ok"
    checks: tuple[Check, ...] = ()
    try:
        run_for_mask(problem, tensors, found, simulate, plan)
        check = compare(found, _expected(problem, plan, tensors, dout), plan, "scores")
        status, checks = "ok" if check.ok else "wrong", (check,)
    except BackendUnavailableError:
        raise
    except CompileError as error:
        alarm, status = from_compile_error(error), "not compiled"
    except FlashCoreError as error:
        alarm, status = from_error(error, problem, plan, plant), "alarm"
    took = time.perf_counter() - start
    return StageResult(
        stage.name, stage.title, plan.describe(), status, checks, alarm, seconds=took
    )


def _expected(
    problem: Problem, plan: MaskPlan, tensors: dict[str, Tensor], dout: Tensor
) -> Expected:
    """Return P (dout.v - delta), summed where the mask is broadcast, and its error."""
    q, k, v, mask = (tensors[name] for name in ("q", "k", "v", "mask"))
    forward = GateModel(problem, plan, q, k, v, mask)
    lse, delta = (tensors[name].double()[..., None] for name in ("lse", "delta"))
    is_empty = lse == -math.inf
    p = torch.exp(forward.scores - lse.masked_fill(is_empty, 0.0)).masked_fill(is_empty, 0.0)
    dout = dout.double().masked_fill(is_empty, 0.0)
    ds = p * (dout @ forward.v.mT - delta)
    size = p * (dout.abs() @ forward.v.abs().mT + delta.abs())
    shape = plan.shape(problem)
    value = ds.sum_to_size(shape)
    rounding = UNIT_ROUNDOFF.get(plan.mask or "", 2.0**-24) * value.abs()
    return Expected("dmask", value, _ERROR * size.sum_to_size(shape) + rounding + 1e-6)
