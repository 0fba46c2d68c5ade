"""Check and time configurations on the GPU, in a child process.

A wrong configuration may hang or spoil the CUDA context; then the child is ended, and the next
question starts another one. Nothing takes part in a final before its results are right.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from flashcore.bench.timing import Timing, first_line, quick_seconds, time_on_gpu
from flashcore.bench.workloads import Workload
from flashcore.kernels.fwd_wmma.plan import Plan

Outcome = float | str  # seconds a call, or why there are none

_START_SECONDS = 120.0  # importing torch
_ROUNDS = 5
_CHECKED_LENGTH = 333  # no multiple of any tile
_CHECKED_WINDOW = 40


class Timer(Protocol):
    """A timer knows what `search` needs to know about a GPU."""

    def quick(self, workload: Workload, plan: Plan) -> Outcome:
        """Return a plan's time, roughly and unchecked, or why it was not timed."""

    def check(self, workload: Workload, plan: Plan) -> str | None:
        """Return what is wrong with a plan's results, or None."""

    def in_turns(self, workload: Workload, plans: Sequence[Plan]) -> list[Outcome]:
        """Return times of plans that take turns, or why one was not timed. Nothing that is wrong
        is."""


class GpuTimer:
    """Time on the current GPU.

    Args:
        timeout_seconds: for one plan; what takes longer hangs.
    """

    def __init__(self, timeout_seconds: float = 30.0, serve: Callable[..., None] | None = None):
        self.timeout_seconds = timeout_seconds
        self._serve = serve or serve_gpu
        self._child: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> GpuTimer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def quick(self, workload: Workload, plan: Plan) -> Outcome:
        """Return a plan's rough time: see Timer."""
        return self._ask("quick", workload, [plan])[0]

    def check(self, workload: Workload, plan: Plan) -> str | None:
        """Check a plan: see Timer."""
        (verdict,) = self._ask("check", workload, [plan])
        return verdict if isinstance(verdict, str) else None

    def in_turns(self, workload: Workload, plans: Sequence[Plan]) -> list[Outcome]:
        """Time plans in turns: see Timer."""
        return self._ask("in_turns", workload, list(plans))

    def _ask(self, what: str, workload: Workload, plans: list[Plan]) -> list[Outcome]:
        try:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            self._connection.send((what, workload, plans))
            if not self._connection.poll(self.timeout_seconds * len(plans)):
                self._end()
                return [f"did not end in {self.timeout_seconds:.0f} s"] * len(plans)
            outcomes, is_sound = self._connection.recv()
        except (EOFError, OSError):
            self._end()
            return ["the process that ran it died"] * len(plans)
        if not is_sound:
            self._end()
        return list(outcomes)

    def _start(self) -> None:
        """Start a child. Raises EOFError where it does not answer."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._child = context.Process(target=_run_child, args=(self._serve, theirs), daemon=True)
        self._child.start()
        theirs.close()  # so that the end of the child is the end of the pipe
        if not self._connection.poll(_START_SECONDS):
            raise EOFError
        self._connection.recv()

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._child.kill()  # a process that waits for a hanging kernel hears nothing milder
            self._child.join()
        self._connection = self._child = None


def _run_child(serve: Callable[[Connection], None], connection: Connection) -> None:
    """Say that imports are done, which may take longer than any plan, and serve."""
    connection.send("ready")
    serve(connection)


def serve_gpu(connection: Connection) -> None:
    """Serve as the child: answer (what, workload, plans) with (outcomes, whether the CUDA
    context is sound). `what` is the name of a method of Timer; to "check" a plan that is right
    answers 0."""
    from flashcore.selection.compiling import ignore_interrupts

    ignore_interrupts()
    bench: _Bench | None = None
    checked: dict[tuple[Workload, Plan], str | None] = {}
    while True:
        try:
            what, workload, plans = connection.recv()
        except EOFError:
            return
        try:
            inputs = _inputs_for(plans[0])
            if bench is None or (bench.workload, bench.make_inputs) != (workload, inputs):
                bench = None  # frees its tensors before the next ones are made
                bench = _Bench(workload, checked, inputs)
            answer = getattr(bench, what)(plans), True
        except Exception as error:  # whatever it is, the search goes on
            answer = [first_line(error)] * len(plans), context_is_sound()
        connection.send(answer)


def context_is_sound() -> bool:
    """Return whether CUDA still works in this process, as after a launch that was refused; after an
    illegal address it does not, and only another process helps."""
    import torch

    try:
        return bool(torch.ones(1, device="cuda").item())
    except Exception:
        return False


class _Bench:
    """Hold one workload's tensors, and what its results must be.

    Args:
        workload: what is timed.
        checked: verdicts on small workloads, which many share; added to.
        make_inputs: the class that holds the workload's tensors.
    """

    def __init__(
        self,
        workload: Workload,
        checked: dict[tuple[Workload, Plan], str | None],
        make_inputs: Any,
    ) -> None:
        self.workload = workload
        self.make_inputs = make_inputs
        self._inputs = make_inputs(workload)
        self._checked_small = checked
        self._checked: dict[Plan, str | None] = {}
        self._reference: Any = None

    def quick(self, plans: Sequence[Plan]) -> list[Outcome]:
        return [quick_seconds(self._inputs.timed_call(plan)) for plan in plans]

    def check(self, plans: Sequence[Plan]) -> list[Outcome]:
        return [self._wrong(plan) or 0.0 for plan in plans]

    def in_turns(self, plans: Sequence[Plan]) -> list[Outcome]:
        right = [plan for plan in plans if self._wrong(plan) is None]
        timings = time_on_gpu({str(plan): self._inputs.timed_call(plan) for plan in right}, _ROUNDS)
        found: list[Outcome] = []
        for plan in plans:
            timing = timings.get(str(plan))
            if timing is None:
                found.append(self._wrong(plan) or "not timed")
            else:
                found.append(timing.median if isinstance(timing, Timing) else timing)
        return found

    def _wrong(self, plan: Plan) -> str | None:
        """Return what is wrong with a plan's results, or None: against float64 on few and ragged
        tiles, against the plan of the rules on the workload itself."""
        if plan not in self._checked:
            small = small_workload(self.workload), plan
            if small not in self._checked_small:
                inputs = self.make_inputs(small[0])
                fits = inputs.fits(plan)
                self._checked_small[small] = inputs.wrong(plan) if fits else None
            self._checked[plan] = self._checked_small[small] or self._differs(plan)
        return self._checked[plan]

    def _differs(self, plan: Plan) -> str | None:
        if self._reference is None:
            self._reference = self._inputs.run(self._inputs.rules(plan))
        pairs = zip(self._inputs.run(plan), self._reference, strict=True)
        found = (difference(*pair) for pair in pairs)
        return next((text for text in found if text is not None), None)


def _inputs_for(plan: Plan) -> Any:
    """Return the class that holds the tensors of a plan's calls."""
    from flashcore.kernels.registry import kernel_of

    if kernel_of(plan).is_backward:
        from flashcore.tune.backward_timing import BackwardInputs

        return BackwardInputs
    return _Inputs


class _Inputs:
    """Hold a workload's tensors on the GPU."""

    def __init__(self, workload: Workload) -> None:
        from flashcore.problem import Problem

        self.workload = workload
        self.q, self.k, self.v = workload.tensors("cuda")
        self.mask = workload.mask_tensor("cuda")
        self.problem = Problem.from_tensors(
            self.q,
            self.k,
            self.v,
            causal=workload.causal,
            window=workload.window,
            softcap=workload.softcap,
            mask=self.mask,
        )

    def rules(self, like: Plan) -> Plan:
        """Return what the rules say in place of a plan."""
        from flashcore.selection.select import candidates

        return candidates(self.problem, kernel=like.kernel)[0]

    def wrong(self, plan: Plan) -> str | None:
        """Return what is wrong with a plan's results beside a float64 oracle, or None."""
        from flashcore.checks.accuracy import error_report

        workload = self.workload
        (out,) = self.run(plan)
        report = error_report(
            out,
            self.q,
            self.k,
            self.v,
            causal=workload.causal,
            window=workload.window,
            softcap=workload.softcap,
            mask=self.mask,
        )
        return None if report.ok else f"wrong result: {report}"

    def fits(self, plan: Plan) -> bool:
        """Return whether a plan's code is made for these options: the bounds of a short workload
        may hide nothing, and such bounds the Problem has not."""
        from flashcore.kernels.registry import forward_of

        fields = forward_of(plan).traits(self.problem)
        return all(getattr(plan, name) == value for name, value in fields.items())

    def run(self, plan: Plan) -> list[Any]:
        """Return the output alone, NaN where the kernel wrote nothing."""
        from flashcore.launch.kernel_call import run_kernel

        out = self.q.new_full((*self.q.shape[:3], self.v.shape[3]), float("nan"))
        run_kernel(self.problem, plan, self.q, self.k, self.v, self.mask, out, None)
        return [out]

    def timed_call(self, plan: Plan) -> Callable[[], Any]:
        """Return what `attention` does for a shape that it has seen."""
        from flashcore.launch.kernel_call import KernelCall

        run = KernelCall(self.problem, plan, self.q.device).run
        addresses = self.q.data_ptr(), self.k.data_ptr(), self.v.data_ptr()
        return lambda: run(self.q, self.k, self.v, self.mask, addresses)[0]


def small_workload(workload: Workload) -> Workload:
    """Return the same options on few tiles, small enough for a float64 oracle."""
    group = workload.num_heads // workload.heads_kv
    left, right = workload.window or (-1, -1)
    window = (min(left, _CHECKED_WINDOW), min(right, _CHECKED_WINDOW))
    return dataclasses.replace(
        workload,
        batch=min(workload.batch, 2),
        num_heads=2 * group,
        num_heads_kv=None if workload.num_heads_kv is None else 2,
        seqlen=min(workload.seqlen, _CHECKED_LENGTH),
        seqlen_k=None if workload.seqlen_k is None else min(workload.keys, _CHECKED_LENGTH),
        window=None if workload.window is None else window,
    )


def difference(out: Any, reference: Any) -> str | None:
    """Return why two outputs [batch, num_heads, seqlen, head_dim] cannot both be right, or None.
    Two tile sizes round different sums, each by far less than the dtype's last place of an output.

    Args:
        out: the output in question.
        reference: an output that is right.
    """
    import torch

    last_place = torch.finfo(out.dtype).eps
    wanted = reference.float()
    distance = (out.float() - wanted).abs()
    mean, limit = float(distance.mean()), last_place * float(wanted.abs().mean())
    if not mean <= limit:  # a NaN fails, too
        return f"wrong result: mean distance {mean:.1e} to the plan of the rules, limit {limit:.1e}"
    largest, limit = float(distance.max()), 4 * last_place * float(wanted.abs().max())
    if not largest <= limit:
        return f"wrong result: distance {largest:.1e} to the plan of the rules, limit {limit:.1e}"
    return None
