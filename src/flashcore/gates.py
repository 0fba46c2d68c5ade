"""Run the kernel stage by stage and name the first stage that is wrong.

The kernel compiles with debug gates (kernels/tile/gates.cuh) that stop after a stage and show its
result, or replace what goes into it. `isolate` runs them in order, compares each with its float64
model (gate_models.py) and finds the first bad value (locate.py). In the simulator a race, a
deadlock or a bad access raises an alarm as well, which counts as a wrong stage.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashcore import env
from flashcore.alarms import Alarm, from_error
from flashcore.cases import Case, Inputs, make_inputs
from flashcore.diagnosis import key_split_hints, verdict
from flashcore.dispatch import KERNELS
from flashcore.errors import BackendUnavailableError, FlashCoreError
from flashcore.gate_models import Expected, GateModel
from flashcore.locate import Check, compare
from flashcore.plan import Plan, select_plan
from flashcore.plan_sm90 import ARCH, OFF_UNDER_A_GATE, obstacle
from flashcore.problem import Problem
from flashcore.stages import Stage, stages_of

if TYPE_CHECKING:
    from flashcore.sim.plants import Plant


BACKENDS = ("sim", *KERNELS)


@dataclass(frozen=True, slots=True)
class StageResult:
    """What came out of one stage. `status` is "ok", "wrong" (values), "alarm" (the simulator or the
    GPU stopped the kernel) or "not run"."""

    stage: str
    title: str
    plan: str
    status: str
    checks: tuple[Check, ...] = ()
    alarm: Alarm | None = None
    hints: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True unless a value is wrong or the run was stopped."""
        return self.status in ("ok", "not run")

    def first_bad_check(self) -> Check | None:
        """The first check that failed, if any."""
        return next((check for check in self.checks if not check.ok), None)


@dataclass(frozen=True, slots=True)
class Isolation:
    """The result of `isolate`.

    `first_wrong` names the first wrong stage (or, where an alarm came from outside the stages,
    "setup", "load" or "store"), None when all are right; `why` gives the reasons.
    """

    case: Case
    backend: str
    kernel: str
    seed: int
    plant: str | None
    first_wrong: str | None
    why: tuple[str, ...]
    stages: tuple[StageResult, ...]

    @property
    def ok(self) -> bool:
        """True when every stage is right."""
        return self.first_wrong is None


def isolate(
    case: Case,
    backend: str,
    *,
    seed: int = 0,
    plant: str | None = None,
    arch: int | None = None,
    kernel: str | None = None,
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Isolation:
    """Run all stages on one case and find the first wrong one.

    Args:
        case: shape and options; its tensors must not be empty.
        backend: "sim", or "wmma" or "sm90" for that kernel on the GPU.
        seed: seed of the simulator's scheduler.
        plant: name of a bug to plant (simulator only), or None.
        arch: architecture to plan for in the simulator, by default the kernel's own or
            FLASHCORE_SIM_ARCH.
        kernel: kernel to simulate, by default as `kernel_to_run` says.
        on_stage: called before each stage.

    Returns:
        All stages and the verdict.

    Raises:
        ValueError: unknown backend or plant, a plant on the GPU or of another kernel, an empty
            case, a dtype, a case or an architecture that the kernel does not take.
    """
    bug = find_plant(plant, backend)
    if kernel is None:
        kernel = kernel_to_run(backend, plant, arch)
    if backend == "sim" and arch is None:
        arch = ARCH if kernel == KERNELS["sm90"] else env.sim_arch()
    inputs = make_inputs(case, "cpu" if backend == "sim" else "cuda")
    runner = _Runner(case, inputs, backend, seed, bug, arch, kernel)
    runner.check()
    results: list[StageResult] = []
    for stage in stages_of(kernel):
        on_stage(stage)
        if results and results[-1].status == "alarm" and backend != "sim":
            # A CUDA error is sticky: nothing runs in this process any more.
            results.append(StageResult(stage.name, stage.title, "", "not run"))
        else:
            results.append(runner.run(stage))
    first_wrong, why = verdict(results, kernel)
    return Isolation(case, backend, kernel, seed, plant, first_wrong, tuple(why), tuple(results))


def find_plant(name: str | None, backend: str) -> Plant | None:
    """The planted bug of that name.

    Raises:
        ValueError: unknown backend or name, or a plant outside the simulator.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if name is None:
        return None
    from flashcore.sim import PLANTS, PLANTS_SM90

    if backend != "sim":
        raise ValueError(f"plant={name!r} needs backend='sim': bugs are planted in the simulator")
    plants = PLANTS | PLANTS_SM90
    if name not in plants:
        raise ValueError(f"plant={name!r} is not one of {', '.join(plants)}")
    return plants[name]


def kernels_of_plant(name: str) -> list[str]:
    """The kernels that have the text that a planted bug replaces."""
    from flashcore.sim import PLANTS, PLANTS_SM90

    suites = {"wmma": PLANTS, "sm90": PLANTS_SM90}
    return [KERNELS[backend] for backend, suite in suites.items() if name in suite]


def kernel_to_run(backend: str, plant: str | None = None, arch: int | None = None) -> str:
    """The kernel that isolate takes apart where none is named: the backend's; in the simulator the
    planted bug's, or the one that serves the architecture (FLASHCORE_SIM_ARCH by default)."""
    if backend != "sim":
        return KERNELS[backend]
    by_arch = KERNELS["sm90" if (arch or env.sim_arch()) == ARCH else "wmma"]
    possible = [by_arch] if plant is None else kernels_of_plant(plant)
    return by_arch if by_arch in possible else possible[0]


@dataclass(slots=True)
class _Runner:
    case: Case
    inputs: Inputs
    backend: str
    seed: int
    plant: Plant | None
    arch: int | None
    kernel: str
    hints: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError unless the kernel takes the case and the plant."""
        problem = self._problem()
        if problem.is_empty:
            raise ValueError(f"{problem.describe()}: there is nothing to compute in an empty case")
        if problem.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype={problem.dtype!r}: the kernel has float16 and bfloat16")
        if self.kernel == KERNELS["sm90"]:
            reason = obstacle(problem)
            if self.arch not in (None, ARCH):
                reason = f"it runs on sm_{ARCH} alone, not on sm_{self.arch}"
            elif reason is None and self._plan(problem, None).kernel != self.kernel:
                reason = "no tile of it fits into shared memory"
            if reason is not None:
                raise ValueError(f"{self.kernel} does not take {problem.describe()}: {reason}")
        if self.plant is not None and self.kernel not in kernels_of_plant(self.plant.name):
            raise ValueError(f"plant={self.plant.name!r} is not a bug of {self.kernel}")

    def _plan(self, problem: Problem, gate: str | None) -> Plan:
        plan = select_plan(problem, self.arch, gate, self.kernel)
        if self.plant is None:
            return plan
        fields = dict(self.plant.plan)
        if gate is not None:
            fields |= {name: off for name, off in OFF_UNDER_A_GATE.items() if name in fields}
        return dataclasses.replace(plan, **fields)

    def run(self, stage: Stage) -> StageResult:
        """Run one stage and judge it. A stage may take several runs (pv takes two)."""
        start = time.perf_counter()
        problem = self._problem()
        plan = self._plan(problem, stage.gate)
        checks: list[Check] = []
        self.hints = []
        alarm = None
        try:
            for check in self._checks(stage, problem, plan):
                checks.append(check)
        except BackendUnavailableError:
            raise
        except (FlashCoreError, torch.AcceleratorError) as error:
            alarm = from_error(error, problem, plan, self.plant)
        bad = any(not check.ok for check in checks)
        status = "alarm" if alarm is not None else "wrong" if bad else "ok"
        elapsed = time.perf_counter() - start
        return StageResult(
            stage.name,
            stage.title,
            plan.describe(),
            status,
            tuple(checks),
            alarm,
            tuple(self.hints),
            elapsed,
        )

    def _problem(self) -> Problem:
        q, k, v = self.inputs.q, self.inputs.k, self.inputs.v
        return Problem.from_tensors(
            q, k, v, mask=self.inputs.mask, return_lse=True, **self.case.options()
        )

    def _checks(self, stage: Stage, problem: Problem, plan: Plan) -> Iterator[Check]:
        model = GateModel(
            problem, plan, self.inputs.q, self.inputs.k, self.inputs.v, self.inputs.mask
        )
        if stage.name == "pv":
            yield from self._pv_checks(problem, plan, model)
            return
        outputs = self._launch(problem, plan)
        if stage.name == "qk":
            expected = model.qk()
        elif stage.name == "softmax":
            expected = model.softmax()
        else:
            expected = model.attention(first_tile_only=stage.name == "tile")
        for item in expected:
            yield _compare(item, outputs[item.name], plan)

    def _pv_checks(self, problem: Problem, plan: Plan, model: GateModel) -> Iterator[Check]:
        """P = 1/seqlen_k first, whose result needs no reference: every row is the mean of V. Then
        the softmax of the scores, which differs in every element."""
        dtype = problem.torch_dtype
        visited = ~model.skippable()
        if bool(visited.all()):
            uniform = torch.full_like(model.scores, 1.0 / problem.seqlen_k).to(dtype)
            out = self._launch(problem, plan, uniform)["out"]
            (expected,) = model.pv(uniform)
            check = _compare(dataclasses.replace(expected, name="out, P = 1/S"), out, plan)
            if not check.ok:
                self.hints += key_split_hints(out, uniform, model.v)
            yield check
            first_row = out[:, :, :1].double().cpu().expand_as(expected.value)
            same = Expected("rows identical, P = 1/S", first_row, torch.zeros_like(first_row))
            yield _compare(same, out, plan)
        probabilities = model.visible_probabilities().to(dtype)
        out = self._launch(problem, plan, probabilities)["out"]
        (expected,) = model.pv(probabilities)
        yield _compare(dataclasses.replace(expected, name="out, P = softmax"), out, plan)

    def _launch(
        self, problem: Problem, plan: Plan, probabilities: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the kernel once; returns what it wrote, NaN elsewhere."""
        device = self.inputs.q.device
        heads, rows = (problem.batch, problem.num_heads_q), problem.seqlen_q

        def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((*heads, rows, *shape), torch.nan, dtype=dtype, device=device)

        outputs = {
            "out": unwritten(problem.head_dim_v, dtype=problem.torch_dtype),
            "lse": unwritten(),
        }
        buffers = None
        if plan.gate is not None:
            num_n_blocks = -(-problem.seqlen_k // plan.block_n)
            outputs["scores"] = unwritten(problem.seqlen_k)
            if probabilities is not None:
                outputs["scores"].copy_(probabilities)
            outputs["row_max"] = unwritten(num_n_blocks)
            outputs["row_sum"] = unwritten(num_n_blocks)
            buffers = {f"gate_{name}": outputs[name] for name in ("scores", "row_max", "row_sum")}
        q, k, v, mask = self.inputs.q, self.inputs.k, self.inputs.v, self.inputs.mask
        out, lse = outputs["out"], outputs["lse"]
        if self.backend != "sim":
            from flashcore.launch import run_kernel

            run_kernel(problem, plan, q, k, v, mask, out, lse, buffers)
            torch.cuda.synchronize()
        else:
            from flashcore.sim import simulate

            simulate(
                problem,
                plan,
                q,
                k,
                v,
                mask,
                out,
                lse,
                buffers,
                seed=self.seed,
                plant=self.plant,
            )
        return outputs


_KINDS = {"scores": "scores", "row_max": "row_tiles", "row_sum": "row_tiles", "lse": "rows"}


def _compare(expected: Expected, actual: Tensor, plan: Plan) -> Check:
    kind = _KINDS.get(expected.name, "out")
    return compare(actual, expected, plan, kind)
