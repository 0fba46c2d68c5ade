"""Check the gradients of random attention calls against the float64 oracle's, each case replayable
from (seed, index) alone.

checks/gradient_drawing.py says which cases there are. The judge is the error rule, for dq, dk and
dv each, and in the simulator every alarm. A call with tiles of its own, or with a planted bug, runs
the backward kernels alone, on the results of a forward in PyTorch; any other runs as a user's does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcore.backends.backward_sm90 import fused_backward
from flashcore.backends.obstacles import SM90_ARCH
from flashcore.backends.packed import packed_problem
from flashcore.base import env
from flashcore.checks.accuracy import ErrorReport, compared
from flashcore.checks.cases import make_inputs
from flashcore.checks.gradient_accuracy import gradient_reports, worst
from flashcore.checks.gradient_drawing import GradientCase, Tiles, draw_gradients
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs
from flashcore.checks.verify import GPU_BACKENDS, CaseResult, resolve_backend, simulator
from flashcore.errors import CompileError
from flashcore.kernels.bwd_sm90.plan import (
    DKDV_KERNEL,
    DQ_KERNEL,
    BwdPlans,
    BwdSm90Plan,
    make_plan,
    select_plans,
)
from flashcore.kernels.fwd_wmma.plan import traits
from flashcore.kernels.registry import BY_NAME
from flashcore.ops.padded import padded_problem
from flashcore.ops.varlen import attention_varlen
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Inputs, Options

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant


def verify_backward(
    backend: str,
    *,
    seed: int = 0,
    indices: Sequence[int] = range(20),
    plant: str | None = None,
    on_case: Callable[[CaseResult], None] = lambda result: None,
) -> list[CaseResult]:
    """Verify the gradients of cases one after the other.

    Args:
        backend: "auto", "sm90", "wmma", "sim" (the kernels for Hopper) or "torch".
        seed: of the run.
        indices: which cases of the run.
        plant: name of a bug to plant in a backward kernel (simulator only), or None.
        on_case: called after each case.

    Returns:
        One result a case, up to the first one whose kernel does not compile, if there is one.

    Raises:
        ValueError: unknown backend or plant, or a plant outside the simulator.
    """
    backend = resolve_backend(backend)
    bug = find_backward_plant(plant, backend)
    results = []
    for index in indices:
        result = _verify_one(backend, seed, index, bug)
        on_case(result)
        results.append(result)
        if result.does_not_compile:
            break
    return results


def find_backward_plant(name: str | None, backend: str) -> Plant | None:
    """Return the planted bug of that name in a backward kernel, or None.

    Raises:
        ValueError: there is no such bug, or the backend is not the simulator.
    """
    if name is None:
        return None
    from flashcore.sim.plants import index

    index.check_backend(name, backend)
    plants = {
        own: plant
        for kernel, of_kernel in index.BY_KERNEL.items()
        if BY_NAME[kernel].is_backward
        for own, plant in of_kernel.items()
    }
    if name not in plants:
        raise ValueError(f"plant={name!r} is not one of the backward's: {', '.join(plants)}")
    return plants[name]


def _verify_one(backend: str, seed: int, index: int, plant: Plant | None) -> CaseResult:
    case = draw_gradients(seed, index, backend)
    number = f"--backward --backend {backend} --seed {seed} --case {index}"
    if plant is not None:
        number += f" --plant {plant.name}"
    found = CaseResult(
        index, case, {}, False, replay=f"flashcore verify {number}",
        isolate=f"flashcore isolate {number}" if backend in ("sim", "sm90") else None,
    )  # fmt: skip
    try:
        with simulator(case.seed, SM90_ARCH):
            report = worst(_reports(case, backend, plant))
    except CompileError as error:
        return dataclasses.replace(found, error=str(error), does_not_compile=True)
    except Exception as error:  # whatever a drawn case raises is a failure to report and to replay
        return dataclasses.replace(found, error=f"{type(error).__name__}: {error}")
    return dataclasses.replace(found, ok=report is None or report.ok, report=report)


def _reports(case: GradientCase, backend: str, plant: Plant | None) -> list[ErrorReport]:
    device = "cuda" if backend in GPU_BACKENDS else "cpu"
    if isinstance(case.call, VarlenCase):
        return list(_packed_reports(case, case.call, backend, device, plant))
    call = case.call
    x = make_inputs(call, device)
    leaves = [tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v)]
    seqlens_k = None
    if case.seqlens_k is not None:
        seqlens_k = torch.tensor(case.seqlens_k, dtype=torch.int32, device=device)
        for batch, length in enumerate(case.seqlens_k):
            x.k[batch, :, length:] = torch.nan
            x.v[batch, :, length:] = torch.nan
    from flashcore import attention

    is_public = case.tiles is None and plant is None
    q, k, v = leaves
    out, lse = attention(
        q,
        k,
        v,
        mask=x.mask,
        sinks=x.sinks,
        seqlens_k=seqlens_k,
        return_lse=True,
        backend=backend if is_public else "torch",
        **call.options(),
    )
    dout, dlse = _cotangents(case, out, lse)
    if is_public:
        gradients = _gradients(out, lse, leaves, dout, dlse)
    else:
        options = Options.checked(call.options()["causal"], call.window, call.softcap, call.scale)
        inputs = Inputs(x.q, x.k, x.v, x.mask, seqlens_k)
        if seqlens_k is None:
            problem = options.problem(x.q, x.k, x.v, x.mask, return_lse=True)
        else:
            problem = padded_problem(inputs, options)
        lengths = {} if seqlens_k is None else {"seqlens_k": seqlens_k}
        given = x.q, x.k, x.v, x.mask, out.detach(), lse.detach(), dout, dlse
        gradients = _fused(case.tiles, plant, problem, given, lengths)
    judged = (x.q, x.k, x.v), x.mask, x.sinks, dout, dlse, out.detach()
    return list(_judged(case, call, gradients, *judged))


def _judged(
    case: GradientCase,
    call: Case,
    gradients: Sequence[Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    sinks: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
) -> Iterator[ErrorReport]:
    """Judge the whole, or sequence by sequence where each has its own number of keys."""
    if case.seqlens_k is None:
        yield from gradient_reports(
            gradients, *qkv, dout, dlse, out=out, mask=mask, sinks=sinks, **call.options()
        )
        return
    dq, dk, dv = gradients
    q, k, v = qkv
    for batch, length in enumerate(case.seqlens_k):
        one = slice(batch, batch + 1)
        own_mask = mask
        if mask is not None:
            own_mask = (mask[one] if mask.shape[0] > 1 else mask)[..., :length]
        yield from gradient_reports(
            (dq[one], dk[one, :, :length], dv[one, :, :length]),
            q[one],
            k[one, :, :length],
            v[one, :, :length],
            None if dout is None else dout[one],
            None if dlse is None else dlse[one],
            out=out[one],
            where=f" of sequence {batch}",
            mask=own_mask,
            sinks=sinks,
            **call.options(),
        )
        for name, x in (("dk", dk), ("dv", dv)):
            yield _zero(x[one, :, length:], f"{name} behind sequence {batch}")


def _zero(x: Tensor, of: str) -> ErrorReport:
    """Judge what has to be 0 exactly."""
    zeros = torch.zeros_like(x, dtype=torch.float64)
    report = compared(x, zeros, zeros, x.dtype, of=of)
    return dataclasses.replace(report, max_limit=0.0, mean_limit=0.0)


def _cotangents(
    case: GradientCase, out: Tensor, lse: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Draw what arrives at out and lse; NaN at rows that see nothing."""
    generator = torch.Generator().manual_seed(case.seed ^ 1)
    dout = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    dlse = torch.randn(lse.shape, generator=generator).to(lse.device, lse.dtype)
    empty = lse.detach() == -torch.inf
    of_rows = empty if out.dim() == 4 else empty.T  # packed: [heads, total], [total, heads, dim]
    dout = dout.masked_fill(of_rows[..., None], torch.nan)
    dlse = dlse.masked_fill(empty, torch.nan)
    return None if case.arrives == "lse" else dout, None if case.arrives == "out" else dlse


def _gradients(
    out: Tensor, lse: Tensor, leaves: Sequence[Tensor], dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """Return autograd's gradients of the leaves; zeros where none arrives."""
    pairs = [(result, x) for result, x in ((out, dout), (lse, dlse)) if x is not None]
    results, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(results, leaves, cotangents, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if x is None else x for x, leaf in zip(found, leaves, strict=True)
    )


def _fused(
    tiles: Tiles | None,
    plant: Plant | None,
    problem: Problem,
    given: tuple[Any, ...],
    lengths: dict[str, Tensor],
) -> tuple[Tensor, ...]:
    """Run the kernels in the simulator with tiles, None for those that are chosen; `given` and
    `lengths` are what fused_backward takes."""
    plans = select_plans(problem)
    if tiles is not None:
        fields = traits(problem) | {"folds_heads": 0}
        plans = BwdPlans(
            make_plan(DQ_KERNEL, tiles[0], fields), make_plan(DKDV_KERNEL, tiles[1], fields)
        )

    def run(problem: Problem, plan: BwdSm90Plan, tensors: dict[str, Tensor]) -> None:
        from flashcore.sim.run_bwd import simulate_backward

        own = plant if plant is not None and _is_in(plant, plan) else None
        if own is not None:
            plan = dataclasses.replace(plan, **dict(own.plan))
        simulate_backward(problem, plan, tensors, seed=env.sim_seed(), plant=own)

    q, k, v, mask, out, lse, dout, dlse = given
    return fused_backward(problem, q, k, v, mask, out, lse, dout, dlse, run, plans, lengths)


def _is_in(plant: Plant, plan: BwdSm90Plan) -> bool:
    """Return whether a plan's kernel has the text that a bug changes."""
    from flashcore.sim.plants import index

    if plan.kernel not in index.kernels_of(plant.name):
        return False
    return "_roles_" not in plant.file or plan.has_roles


def _packed_reports(
    case: GradientCase, call: VarlenCase, backend: str, device: str, plant: Plant | None
) -> Iterator[ErrorReport]:
    x = make_varlen_inputs(call, device)
    leaves = [tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v)]
    q, k, v = leaves
    is_public = case.tiles is None and plant is None
    out, lse = attention_varlen(
        q,
        k,
        v,
        *x.arguments()[3:],
        sinks=x.sinks,
        return_lse=True,
        backend=backend if is_public else "torch",
        **call.options(),
    )
    dout, dlse = _cotangents(case, out, lse)
    if is_public:
        dq, dk, dv = _gradients(out, lse, leaves, dout, dlse)
    else:
        problem = packed_problem(*x.arguments(), **call.options())
        lengths = {"cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
        of_out = None if dout is None else as_batch(dout)
        tensors = (as_batch(tensor) for tensor in (x.q, x.k, x.v))
        given = *tensors, None, as_batch(out.detach()), lse.detach(), of_out, dlse
        batched = _fused(case.tiles, plant, problem, given, lengths)
        dq, dk, dv = (gradient[0].transpose(0, 1) for gradient in batched)

    def rows(tensor: Tensor, part: slice) -> Tensor:
        return tensor[part].unsqueeze(0).transpose(1, 2)

    ends_q, ends_k = (
        list(itertools.accumulate(lengths, initial=0))
        for lengths in (call.lengths_q, call.lengths_k)
    )
    for number in range(len(call.lengths_q)):
        of_q = slice(*ends_q[number : number + 2])
        of_k = slice(*ends_k[number : number + 2])
        yield from gradient_reports(
            (rows(dq, of_q), rows(dk, of_k), rows(dv, of_k)),
            rows(x.q, of_q),
            rows(x.k, of_k),
            rows(x.v, of_k),
            None if dout is None else rows(dout, of_q),
            None if dlse is None else dlse[None, :, of_q],
            out=rows(out.detach(), of_q),
            where=f" of sequence {number}",
            sinks=x.sinks,
            **call.options(),
        )
    for name, tensor, ends in (("dq", dq, ends_q), ("dk", dk, ends_k), ("dv", dv, ends_k)):
        yield _zero(tensor[ends[-1] :], f"{name} behind the last sequence")
