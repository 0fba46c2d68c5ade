"""Checks and times configurations on the GPU, in a child process.

A wrong configuration may hang or spoil the CUDA context; then the child is ended, and the next
question starts another one. Nothing is timed before its results are right.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from flashcore.bench.workloads import Workload
from flashcore.plan import Plan

Outcome = float | str  # seconds a call, or why there are none

_START_SECONDS = 120.0  # importing torch, the first CUDA call, first compilations
_ROUNDS = 5
_CHECKED_LENGTH = 333  # no multiple of any tile
_CHECKED_WINDOW = 40


class Timer(Protocol):
    """What `search` needs to know about a GPU."""

    def __call__(self, workload: Workload, plans: Sequence[Plan]) -> list[Outcome]:
        """Times of plans that take turns, or why one was not timed."""


class GpuTimer:
    """A Timer on the current GPU.

    Args:
        timeout_seconds: for one call; who takes longer hangs.
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

    def __call__(self, workload: Workload, plans: Sequence[Plan]) -> list[Outcome]:
        timeout = self.timeout_seconds
        if self._connection is None:
            timeout += _START_SECONDS
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((workload, list(plans)))
            if not self._connection.poll(timeout):
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
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._child = context.Process(target=self._serve, args=(theirs,), daemon=True)
        self._child.start()
        theirs.close()  # so that the end of the child is the end of the pipe

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._child.kill()  # a process that waits for a hanging kernel hears nothing milder
            self._child.join()
        self._connection = self._child = None


def serve_gpu(connection: Connection) -> None:
    """The child: answers (workload, plans) with (outcomes, whether the CUDA context is sound)."""
    from flashcore.tune.compiling import ignore_interrupts

    ignore_interrupts()
    bench: _Bench | None = None
    while True:
        try:
            workload, plans = connection.recv()
        except EOFError:
            return
        try:
            if bench is None or bench.workload != workload:
                bench = None  # frees its tensors before the next ones are made
                bench = _Bench(workload)
            answer = bench.outcomes(plans), True
        except Exception as error:  # whatever it is, the parent goes on with another child
            reason = str(error).strip().splitlines() or [type(error).__name__]
            answer = [reason[0][:160]] * len(plans), False
        connection.send(answer)


class _Bench:
    """One workload's tensors, and what its results must be."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.full = _Inputs(workload)
        self.small = _Inputs(small_workload(workload))
        self.checked: dict[Plan, str | None] = {}

    def outcomes(self, plans: Sequence[Plan]) -> list[Outcome]:
        from flashcore.bench.timing import Timing, time_on_gpu

        for plan in plans:
            if plan not in self.checked:
                self.checked[plan] = self._wrong(plan)
        right = [plan for plan in plans if self.checked[plan] is None]
        calls = {str(plan): self.full.call(plan) for plan in right}
        timings = time_on_gpu(calls, _ROUNDS)
        found: list[Outcome] = []
        for plan in plans:
            timing = timings.get(str(plan))
            if timing is None:
                found.append(self.checked[plan] or "not timed")
            else:
                found.append(timing.median if isinstance(timing, Timing) else timing)
        return found

    def _wrong(self, plan: Plan) -> str | None:
        """What is wrong with a plan's results, or None: against float64 on few and ragged tiles,
        against the plan of the tables on the workload itself."""
        from flashcore.accuracy import error_report

        if self.small.fits(plan):
            asked, small = self.small.workload, self.small
            report = error_report(
                small.call(plan)(),
                small.q,
                small.k,
                small.v,
                causal=asked.causal,
                window=asked.window,
                softcap=asked.softcap,
                mask=small.mask,
            )
            if not report.ok:
                return f"wrong result: {report}"
        reference = self.full.call(self.full.default(plan.kernel))()
        return difference(self.full.call(plan)(), reference)


class _Inputs:
    """A workload's tensors on the GPU."""

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

    def default(self, kernel: str) -> Plan:
        """What the tables say."""
        from flashcore.plan import candidates

        return candidates(self.problem, kernel=kernel)[0]

    def fits(self, plan: Plan) -> bool:
        """Whether a plan's code is made for these options: the bounds of a short workload may hide
        nothing, and such bounds the Problem has not."""
        from flashcore.plan import traits

        return all(getattr(plan, name) == value for name, value in traits(self.problem).items())

    def call(self, plan: Plan) -> Callable[[], Any]:
        """A call that returns the output, which the next call overwrites."""
        from flashcore.launch import run_kernel

        out = self.q.new_full((*self.q.shape[:3], self.v.shape[3]), float("nan"))

        def call() -> Any:
            run_kernel(self.problem, plan, self.q, self.k, self.v, self.mask, out, None)
            return out

        return call


def small_workload(workload: Workload) -> Workload:
    """The same options on few tiles, small enough for a float64 oracle."""
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
    """Why two outputs [batch, num_heads, seqlen, head_dim] cannot both be right, or None. Two tile
    sizes round different sums, each by far less than the dtype's last place of an output.

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
        return (
            f"wrong result: mean distance {mean:.1e} to the plan of the tables, limit {limit:.1e}"
        )
    largest, limit = float(distance.max()), 4 * last_place * float(wanted.abs().max())
    if not largest <= limit:
        return f"wrong result: distance {largest:.1e} to the plan of the tables, limit {limit:.1e}"
    return None
