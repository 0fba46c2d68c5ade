"""Check random attention calls against the float64 oracle, each replayable from (seed, index)
alone.

checks/drawing.py says which cases there are, and with which tiles. The judge is the error rule of
checks/accuracy.py, and in the simulator every alarm.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import BACKENDS, KERNELS
from flashcore.backends.packed import packed_problem
from flashcore.base import env
from flashcore.checks.accuracy import ErrorReport, error_report
from flashcore.checks.cases import make_inputs
from flashcore.checks.drawing import Drawn, draw
from flashcore.checks.gradient_drawing import GradientCase
from flashcore.checks.planned import format_tile, run_planned, with_fields
from flashcore.checks.varlen_cases import (
    VarlenCase,
    VarlenInputs,
    make_varlen_inputs,
    varlen_error_report,
)
from flashcore.errors import CompileError
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH, Plan
from flashcore.kernels.registry import forward_for
from flashcore.launch.allocation import unseen_scores
from flashcore.ops.varlen import attention_varlen
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.problem.memory_layout import as_batch
from flashcore.selection.select import select_plan

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant

GPU_BACKENDS = tuple(KERNELS)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A result holds one verified case, and the tile it ran with, see drawing.Drawn. `error` is
    the exception's text when the call failed; `replay` runs the case again, `isolate` takes it
    apart."""

    index: int
    case: Case | VarlenCase | GradientCase
    tile: Mapping[str, Any]
    ok: bool
    replay: str
    isolate: str | None = None
    report: ErrorReport | None = None
    error: str | None = None
    does_not_compile: bool = False

    def describe(self) -> str:
        """Return what went wrong, or how large the errors are."""
        if self.error is None and self.report is None:
            return "nothing to compute"
        return self.error if self.error is not None else str(self.report)

    def describe_call(self) -> str:
        """Return the case, and the tile if it is not the one that is chosen, in a line."""
        return self.case.describe() + (f", tile {format_tile(self.tile)}" if self.tile else "")


def resolve_backend(name: str) -> str:
    """Return the backend that "auto" stands for here: the GPU's preferred kernel, else torch.

    Raises:
        ValueError: unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not one of {', '.join(BACKENDS)}")
    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "torch"
    major, minor = torch.cuda.get_device_capability()
    return forward_for(10 * major + minor).backend


def verify(
    backend: str,
    *,
    seed: int = 0,
    indices: Sequence[int] = range(20),
    arch: int | None = None,
    plant: str | None = None,
    on_case: Callable[[CaseResult], None] = lambda result: None,
) -> list[CaseResult]:
    """Verify cases one after the other.

    Args:
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        seed: of the run.
        indices: which cases of the run.
        arch: architecture whose kernel "sim" runs, by default FLASHCORE_SIM_ARCH.
        plant: name of a bug to plant (simulator only), or None.
        on_case: called after each case.

    Returns:
        One result a case, up to the first one whose kernel does not compile, if there is one.

    Raises:
        ValueError: unknown backend or plant, or a plant outside the simulator.
    """
    backend = resolve_backend(backend)
    arch = arch or env.sim_arch()
    bug = find_plant(plant, backend, arch)
    results = []
    for index in indices:
        result = _verify_one(backend, seed, index, arch, bug)
        on_case(result)
        results.append(result)
        if result.does_not_compile:
            break
    return results


def find_plant(name: str | None, backend: str, arch: int | None) -> Plant | None:
    """Return the planted bug of that name in the kernel that an architecture gets, or None.

    Raises:
        ValueError: there is no such bug in it, or the backend is not the simulator.
    """
    if name is None:
        return None
    from flashcore.sim.plants import index

    index.check_backend(name, backend)
    return index.find_plant(name, forward_for(arch or env.sim_arch()).name)


def _verify_one(backend: str, seed: int, index: int, arch: int, plant: Plant | None) -> CaseResult:
    drawn = draw(seed, index, backend, arch)
    number = f"--backend {backend} --seed {seed} --case {index}"
    if backend == "sim" and arch != SIM_ARCH:
        number += f" --arch sm_{arch}"
    if plant is not None:
        number += f" --plant {plant.name}"
    found = CaseResult(
        index,
        drawn.case,
        drawn.tile,
        False,
        replay=f"flashcore verify {number}",
        isolate=None if backend == "torch" else f"flashcore isolate {number}",
    )
    try:
        with simulator(drawn.case.seed, arch):
            report = _judge(drawn, backend, arch, plant)
    except CompileError as error:
        return dataclasses.replace(found, error=str(error), does_not_compile=True)
    except Exception as error:  # whatever a drawn case raises is a failure to report and to replay
        return dataclasses.replace(found, error=f"{type(error).__name__}: {error}")
    return dataclasses.replace(found, ok=report is None or report.ok, report=report)


def _judge(drawn: Drawn, backend: str, arch: int, plant: Plant | None) -> ErrorReport | None:
    """Run a case and judge it; None where there is no query."""
    device = "cuda" if backend in GPU_BACKENDS else "cpu"
    # The public function, unless there is something to say that it does not take.
    is_public = not drawn.tile and plant is None
    if isinstance(drawn.case, VarlenCase):
        packed_x = make_varlen_inputs(drawn.case, device)
        packed = _call_packed if is_public else functools.partial(_plan_packed, drawn, arch, plant)
        return varlen_error_report(*packed(drawn.case, packed_x, backend), drawn.case, packed_x)
    from flashcore import attention

    case, x = drawn.case, make_inputs(drawn.case, device)
    asked: dict[str, Any] = {"return_lse": True, "return_max_score": case.return_max_score}
    max_score = None
    if is_public:
        out, lse, *others = attention(
            x.q, x.k, x.v, mask=x.mask, sinks=x.sinks, backend=backend, **asked, **case.options()
        )
        max_score = others[0] if others else None
    else:
        problem = Problem.from_tensors(
            x.q, x.k, x.v, mask=x.mask, sinks=x.sinks, **asked, **case.options()
        )
        max_score = unseen_scores(problem, x.q) if case.return_max_score else None
        plan = _plan(problem, backend, arch, drawn.tile)
        out = x.q.new_empty((*x.q.shape[:3], case.head_dim_v))
        lse = x.q.new_empty(x.q.shape[:3], dtype=torch.float32)
        run_planned(
            problem, plan, x.q, x.k, x.v, x.mask, out, lse, None, x.others,
            max_score=max_score, seed=env.sim_seed(), plant=plant,
        )  # fmt: skip
    return error_report(
        out, x.q, x.k, x.v, lse=lse, mask=x.mask, sinks=x.sinks, max_score=max_score,
        **case.options(),
    )  # fmt: skip


def _call_packed(case: VarlenCase, x: VarlenInputs, backend: str) -> tuple[Tensor, Tensor]:
    return attention_varlen(
        *x.arguments(), sinks=x.sinks, return_lse=True, backend=backend, **case.options()
    )


def _plan_packed(
    drawn: Drawn, arch: int, plant: Plant | None, case: VarlenCase, x: VarlenInputs, backend: str
) -> tuple[Tensor, Tensor]:
    problem = packed_problem(*x.arguments(), sinks=x.sinks, **case.options())
    if problem.is_empty:
        return _call_packed(case, x, backend)
    plan = _plan(problem, backend, arch, drawn.tile)
    out = x.q.new_empty((*x.q.shape[:2], case.head_dim_v))
    lse = x.q.new_empty((case.num_heads_q, x.q.shape[0]), dtype=torch.float32)
    q, k, v = (as_batch(tensor) for tensor in (x.q, x.k, x.v))
    run_planned(
        problem, plan, q, k, v, None, out, lse, None, x.others, seed=env.sim_seed(), plant=plant
    )
    return out, lse


def _plan(problem: Problem, backend: str, arch: int, tile: Mapping[str, Any]) -> Plan:
    """Return the plan that is chosen, with the tile's fields."""
    chosen = select_plan(problem, arch if backend == "sim" else None, None, KERNELS.get(backend))
    return with_fields(chosen, tile)


@contextmanager
def simulator(seed: int, arch: int) -> Iterator[None]:
    """Give the simulator's scheduler the case's seed, so that replaying a case replays the run."""
    wanted = {env.SIM_SEED.name: str(seed), env.SIM_ARCH.name: str(arch)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
