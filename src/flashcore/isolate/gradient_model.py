"""Model in float64 what the backward kernels must produce, with error bounds.

As in gate_models.py, straight from the definition and without tiles:

    P = exp(s - lse)          delta = sum(dO O) - dlse      dS = P (dO V^T - delta) softcap'(s)
    dV = P^T dO               dK = scale dS^T Q             dQ = scale dS K

out and lse are those that the kernels are given, whatever they are, so that the forward's rounding
is no part of the error. The gates dv, dk and dq are given P or dS as well: those of this model,
rounded to the dtype.
"""

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


from flashcore.isolate.gate_models import (
    APPROX,
    SMALLEST_STEP,
    U32,
)
from flashcore.kernels.fwd_wmma.plan import Plan


class GradientModel:
    """Compute the gradients of one problem in float64.

    Args:
        problem: of the forward.
        plan: of one of the kernels.
        q: on the CPU like all that follow, [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: as in flashcore.attention, or None.
        out: [batch, num_heads_q, seqlen_q, head_dim_v], the forward's.
        lse: [batch, num_heads_q, seqlen_q], the forward's; -inf in rows that see nothing.
        dout: gradient of out; anything in rows that see nothing.
        dlse: gradient of lse.
    """

    def __init__(
        self, problem: Problem, plan: Plan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    ) -> None:  # fmt: skip
        self._problem = problem
        forward = GateModel(problem, plan, q, k, v, mask)
        self._forward, lse = forward, lse.double()[..., None]
        is_empty = lse == -torch.inf
        self._dout = dout.double().masked_fill(is_empty, 0.0)
        # A kernel may pass over tiles that nobody sees, and rows without a key have any dO.
        self._is_unseen = (forward.scores == -torch.inf) | is_empty

        p = torch.exp(forward.scores - lse.masked_fill(is_empty, 0.0)).masked_fill(is_empty, 0.0)
        slack = 2 * forward.score_tolerance + lse.abs().nan_to_num(posinf=0.0) * APPROX
        p_error = p * torch.expm1((slack + 4 * APPROX).clamp(max=600.0)) + 1e-9
        self._p = p, p_error

        dlse = dlse.double()[..., None].masked_fill(is_empty, 0.0)
        products = self._dout * out.double()
        delta = products.sum(-1, keepdim=True) - dlse
        magnitude = products.abs().sum(-1, keepdim=True) + dlse.abs()
        delta_error = 2 * (problem.head_dim_v + 16) * U32 * magnitude + 1e-9
        self._delta = delta, delta_error

        dp = self._dout @ forward.v.mT
        dp_error = 2 * (problem.head_dim_v + 16) * U32 * (self._dout.abs() @ forward.v.abs().mT)
        slope, slope_error = self._slope()
        difference = (dp - delta).abs()
        ds = p * (dp - delta) * slope
        # P may have been rounded to the dtype on its way here.
        p_error = p_error + self._rounding(p)
        error = p_error * difference + p * (dp_error + delta_error) + p * difference * slope_error
        self._ds = ds, error + 1e-9

    def _slope(self) -> tuple[Tensor, Tensor]:
        """Return the derivative of soft-capping for every score, and its error."""
        problem, raw = self._problem, self._forward.raw
        if not problem.softcap:
            return torch.ones_like(raw), torch.zeros_like(raw)
        capped = torch.tanh(raw * problem.scale / problem.softcap)
        return 1 - capped**2, torch.full_like(raw, 8 * APPROX)

    def delta(self) -> Expected:
        """Return delta, [batch, num_heads_q, seqlen_q]."""
        delta, error = self._delta
        return Expected("delta", delta[..., 0], error[..., 0])

    def ds(self) -> Expected:
        """Return dS before it is rounded, [batch, num_heads_q, seqlen_q, seqlen_k]."""
        return Expected("ds", *self._ds, self._is_unseen)

    def given(self, gate: str) -> Tensor:
        """Return what a gate takes over, float32: P for dv, dS for dk and dq."""
        x = (self._p if gate == "dv" else self._ds)[0]
        return x.to(self._problem.torch_dtype).float()

    def gradient(self, name: str, is_given: bool = False) -> Expected:
        """Return dq, dk or dv as a kernel stores it; with `is_given`, of what its gate is given."""
        x, error = self._p if name == "dv" else self._ds
        if is_given:
            x = self.given(name).double()
            error = torch.zeros_like(x)
        if name == "dq":
            return self._stored(name, *self._sum(x, error, self._forward.k, self._problem.scale))
        other = self._dout if name == "dv" else self._forward.q
        pair = self._sum(x.mT, error.mT, other, 1.0 if name == "dv" else self._problem.scale)
        heads = self._problem.num_heads_kv  # the query heads that share one are summed up
        return self._stored(name, *(y.unflatten(1, (heads, -1)).sum(2) for y in pair))

    def _sum(self, a: Tensor, a_error: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return scale a b and its error. A tensor core takes `a` rounded to the dtype."""
        accumulated = 2 * (a.shape[-1] + 16) * U32 * a.abs()
        error = (a_error + self._rounding(a) + accumulated) @ b.abs() * abs(scale)
        return a @ b * scale, error

    def _rounding(self, x: Tensor) -> Tensor:
        dtype = self._problem.dtype
        return UNIT_ROUNDOFF[dtype] * x.abs() + SMALLEST_STEP[dtype] * (x != 0)

    def _stored(self, name: str, value: Tensor, error: Tensor) -> Expected:
        return Expected(name, value, error + self._forward.store_rounding(value))


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
            and a row in the middle sees nothing. Gradients that arrive there are NaN.
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
