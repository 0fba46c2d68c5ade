"""Run the kernel stage by stage and name the first stage that is wrong.

The kernel compiles with debug gates (kernels/tile/gates.cuh) that stop after a stage and show its
result, or replace what goes into it. `isolate` runs them in order, compares each with its float64
model (isolate/gate_models.py) and finds the first bad value (isolate/locate.py). In the simulator a
race, a deadlock or a bad access raises an alarm as well, which counts as a wrong stage.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import KERNELS
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.checks.paged_cases import PagedCase
from flashcore.checks.planned import compile_planned, run_planned, under_gate, with_fields
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.errors import BackendUnavailableError, CompileError, FlashCoreError
from flashcore.isolate.alarms import from_compile_error, from_error
from flashcore.isolate.backward import isolate_backward
from flashcore.isolate.call import Call, call_of
from flashcore.isolate.choosing import kernel_to_run
from flashcore.isolate.diagnosis import key_split_hints, verdict
from flashcore.isolate.gate_models import Expected, GateModel, by_error_rule
from flashcore.isolate.gradient_model import isolate_mask_gradient
from flashcore.isolate.isolation import Isolation, StageResult
from flashcore.isolate.locate import Check, compare
from flashcore.kernels.bwd_mask_sm90.kernel import DMASK
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import BY_NAME, forward
from flashcore.kernels.stage import Stage
from flashcore.launch.allocation import unseen_scores
from flashcore.problem.case import Case
from flashcore.problem.memory_layout import as_batch
from flashcore.selection.select import select_plan

if TYPE_CHECKING:
    from flashcore.compile.plant import Plant
    from flashcore.isolate.registry import Planted


BACKENDS = ("sim", *KERNELS)


def isolate(
    case: Case | VarlenCase | PagedCase,
    backend: str,
    *,
    seed: int = 0,
    plant: str | None = None,
    arch: int | None = None,
    kernel: str | None = None,
    tile: Mapping[str, Any] | None = None,
    tiles: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
    arrives: str = "both",
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Isolation:
    """Run all stages on one case and find the first wrong one.

    Args:
        case: shape and options; its tensors must not be empty. Of packed sequences the whole kernel
            is run and no gate, for what gates write has the shape of a batch.
        backend: "sim", or "wmma" or "sm90" for that kernel on the GPU.
        seed: seed of the simulator's scheduler.
        plant: name of a bug to plant (simulator only), or None.
        arch: architecture to plan for in the simulator, by default the kernel's own or
            FLASHCORE_SIM_ARCH.
        kernel: kernel to simulate, by default as `kernel_to_run` says; both backward kernels for
            either of them, see isolate/backward.py.
        tile: fields of the plan, see planned.with_fields; by default those of the planted bug, and
            what is chosen for any call.
        tiles: of the backward kernels, as `isolate_backward` takes them.
        arrives: where a gradient arrives in a backward pass: "out", "lse" or "both".
        on_stage: called before each stage.

    Returns:
        All stages and the verdict. Where the kernel does not compile, nothing is run behind the
        first stage.

    Raises:
        ValueError: unknown backend or plant, a plant on the GPU or of another kernel, an empty
            case, a dtype, a case, a tile or an architecture that the kernel does not take.
    """
    find_plant(plant, backend)
    if kernel is None:
        kernel = kernel_to_run(backend, plant, arch)
    planted = find_plant(plant, backend, kernel)
    if tile is None:
        tile = {} if planted is None else planted.tile
    bug = None if planted is None else planted.plant
    if BY_NAME[kernel].is_backward:
        if isinstance(case, PagedCase):
            raise ValueError(f"case={case!r} has pages, which {kernel} does not read")
        if BY_NAME[kernel] is DMASK:
            return isolate_mask_gradient(
                case, kernel, seed=seed, plant=bug, arch=arch, tile=tile, on_stage=on_stage
            )
        return isolate_backward(
            case, kernel, backend=backend, seed=seed, plant=bug, arch=arch, tile=tile,
            tiles=tiles, arrives=arrives, on_stage=on_stage,
        )  # fmt: skip
    if backend == "sim" and arch is None:
        arch = BY_NAME[kernel].only_arch or env.sim_arch()
    call = call_of(case, "cpu" if backend == "sim" else "cuda")
    runner = _Runner(call, backend, seed, bug, arch, kernel, dict(tile))
    runner.check()
    results: list[StageResult] = []
    is_over = False
    for stage in BY_NAME[kernel].stages:
        on_stage(stage)
        found = None
        if not is_over and not (call.has_lengths and stage.gate is not None):
            found = runner.run(stage)
            # A CUDA error is sticky: nothing runs in this process any more.
            is_sticky = found.status == "alarm" and backend != "sim"
            is_over = is_sticky or (found.status == "not compiled" and not runner.compiles())
        results.append(found or StageResult(stage.name, stage.title, "", "not run"))
    first_wrong, why = verdict(results, kernel)
    return Isolation(
        case, backend, kernel, seed, plant, tile, first_wrong, tuple(why), tuple(results)
    )


def find_plant(name: str | None, backend: str, kernel: str | None = None) -> Planted | None:
    """Return the planted bug of that name.

    Raises:
        ValueError: unknown backend or name, a plant outside the simulator, or one of another
            kernel.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if name is None:
        return None
    from flashcore.isolate import registry

    return registry.find_plant(name, backend, kernel)


@dataclass(slots=True)
class _Runner:
    call: Call
    backend: str
    seed: int
    plant: Plant | None
    arch: int | None
    kernel: str
    tile: dict[str, Any]
    hints: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise ValueError unless the kernel takes the case and the tile."""
        problem = self.call.problem
        if problem.is_empty:
            raise ValueError(f"{problem.describe()}: there is nothing to compute in an empty case")
        if problem.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype={problem.dtype!r}: the kernel has float16 and bfloat16")
        kernel = forward(self.kernel)
        reason = kernel.obstacle(problem)
        if self.arch is not None and not kernel.serves(self.arch):
            reason = f"it runs on sm_{kernel.only_arch} alone, not on sm_{self.arch}"
        elif reason is None and self._plan(None).kernel != self.kernel:
            reason = "no tile of it fits into shared memory"
        if reason is not None:
            raise ValueError(f"{self.kernel} does not take {problem.describe()}: {reason}")

    def _plan(self, gate: str | None) -> Plan:
        plan = select_plan(self.call.problem, self.arch, gate, self.kernel)
        tile = self.tile if gate is None else under_gate(forward(self.kernel), self.tile)
        return with_fields(plan, tile)

    def run(self, stage: Stage) -> StageResult:
        """Run one stage and judge it. A stage may take several runs (pv takes two)."""
        start = time.perf_counter()
        plan = self._plan(stage.gate)
        checks: list[Check] = []
        self.hints = []
        alarm, status = None, "ok"
        try:
            for check in self._checks(stage, plan):
                checks.append(check)
                status = status if check.ok else "wrong"
        except BackendUnavailableError:
            raise
        except CompileError as error:
            alarm, status = from_compile_error(error), "not compiled"
        except (FlashCoreError, torch.AcceleratorError) as error:
            alarm, status = from_error(error, self.call.problem, plan, self.plant), "alarm"
        return StageResult(
            stage.name,
            stage.title,
            plan.describe(),
            status,
            tuple(checks),
            alarm,
            tuple(self.hints),
            time.perf_counter() - start,
        )

    def compiles(self) -> bool:
        """Return whether the kernel itself compiles, which a gate of it may not."""
        try:
            compile_planned(self._plan(None), self.call.q.is_cuda, self.plant)
        except CompileError:
            return False
        return True

    def _checks(self, stage: Stage, plan: Plan) -> Iterator[Check]:
        call = self.call
        if call.has_lengths:
            outputs = self._launch(plan)
            for item in call.expected(plan):
                yield _compare(item, outputs[item.name], plan)
            return
        sinks = call.lengths.get("sinks")
        model = GateModel(call.problem, plan, call.q, call.k, call.v, call.mask, sinks)
        if stage.name == "pv":
            yield from self._pv_checks(plan, model)
            return
        outputs = self._launch(plan)
        if stage.name == "qk":
            expected = model.qk()
        elif stage.name == "softmax":
            expected = model.softmax()
        else:
            expected = model.attention(first_tile_only=stage.name == "tile")
        for item in expected:
            yield _compare(item, outputs[item.name], plan)
        if stage.gate is None:
            out = outputs["out"]
            rule = error_report(out, call.q, call.k, call.v, mask=call.mask, **call.options)
            for item in expected:
                yield _compare(by_error_rule(item, rule), outputs[item.name], plan)
            if plan.returns_max_score:
                yield _compare(*model.max_score(outputs["max_score"]), plan)

    def _pv_checks(self, plan: Plan, model: GateModel) -> Iterator[Check]:
        """Check P = 1/seqlen_k first, whose result needs no reference: every row is the mean of V.
        Then the softmax of the scores, which differs in every element."""
        dtype, seqlen_k = self.call.problem.torch_dtype, self.call.problem.seqlen_k
        visited = ~model.skippable()
        if bool(visited.all()):
            uniform = torch.full_like(model.scores, 1.0 / seqlen_k).to(dtype)
            out = self._launch(plan, uniform)["out"]
            (expected,) = model.pv(uniform)
            check = _compare(dataclasses.replace(expected, name="out, P = 1/S"), out, plan)
            if not check.ok:
                self.hints += key_split_hints(out, uniform, model.v)
            yield check
            first_row = out[:, :, :1].double().cpu().expand_as(expected.value)
            same = Expected("rows identical, P = 1/S", first_row, torch.zeros_like(first_row))
            yield _compare(same, out, plan)
        probabilities = model.visible_probabilities().to(dtype)
        out = self._launch(plan, probabilities)["out"]
        (expected,) = model.pv(probabilities)
        yield _compare(dataclasses.replace(expected, name="out, P = softmax"), out, plan)

    def _launch(self, plan: Plan, probabilities: Tensor | None = None) -> dict[str, Tensor]:
        """Run the kernel once; returns what it wrote, NaN elsewhere."""
        call, problem = self.call, self.call.problem
        leading: tuple[int, ...] = (problem.batch, problem.num_heads_q, problem.seqlen_q)
        rows = leading
        if call.is_packed:
            leading, rows = (problem.total_q, problem.num_heads_q), call.q.shape[1:3]

        def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, torch.nan, dtype=dtype, device=call.q.device)

        out = unwritten(*leading, problem.head_dim_v, dtype=problem.torch_dtype)
        outputs = {"out": out, "lse": unwritten(*rows)}
        buffers = None
        if plan.gate is not None:
            num_n_blocks = -(-problem.seqlen_k // plan.block_n)
            outputs["scores"] = unwritten(*rows, problem.seqlen_k)
            if probabilities is not None:
                outputs["scores"].copy_(probabilities)
            outputs["row_max"] = unwritten(*rows, num_n_blocks)
            outputs["row_sum"] = unwritten(*rows, num_n_blocks)
            buffers = {f"gate_{name}": outputs[name] for name in ("scores", "row_max", "row_sum")}
        if plan.returns_max_score:
            outputs["max_score"] = unseen_scores(problem, call.q)
        run_planned(
            problem, plan, call.q, call.k, call.v, call.mask, out, outputs["lse"], buffers,
            call.lengths, max_score=outputs.get("max_score"), seed=self.seed, plant=self.plant,
        )  # fmt: skip
        if call.is_packed:
            outputs |= {"out": as_batch(out), "lse": outputs["lse"][None]}
        return outputs


_KINDS = {"scores": "scores", "row_max": "row_tiles", "row_sum": "row_tiles"}
_KINDS |= {"lse": "rows", "max_score": "rows"}


def _compare(expected: Expected, actual: Tensor, plan: Plan) -> Check:
    kind = _KINDS.get(expected.name.partition(",")[0], "out")
    return compare(actual, expected, plan, kind)
