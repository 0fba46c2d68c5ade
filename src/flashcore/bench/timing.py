"""Time calls on the GPU by CUDA graph replays, on the CPU by the clock.

A graph holds many calls, so the host's launch cost does not show and what is measured is the
kernel's time, including gaps between dependent kernels. The libraries' replays take turns in every
round, in a new order: clocks and temperature drift over a run, and a GPU at its power limit is the
faster the less the library before has heated it. This way that happens to everybody alike.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]

_GRAPH_SECONDS = 2e-3  # one replay lasts about this long: far above a replay's own start-up
_MAX_CALLS_IN_GRAPH = 200
# To capture a call costs the host more than to run it costs the GPU.
_QUICK_GRAPH_SECONDS, _QUICK_CALLS_IN_GRAPH = 5e-4, 50
_TRIAL_CALLS = 5
_LONG_CALL_SECONDS = 1e-3  # from here on an eager call takes as long as its kernel


@dataclass(frozen=True, slots=True)
class Timing:
    """A timing holds seconds per call. `eager` includes the host: calls back to back, without a
    graph; of a backward pass together with its forward."""

    median: float
    rounds: tuple[float, ...]
    eager: float | None = None
    by_graph: bool = True


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes are what is timed of a backward pass.

    Args:
        backward: computes the gradients of an output that is there.
        step: computes the output and the gradients.
        gradients: returns dq, dk and dv, as `attention` has q, k and v.
        wait: None, or for work that no CUDA graph of torch can hold, what waits for it.
    """

    backward: Call
    step: Call
    gradients: Callable[[], Sequence[Tensor]]
    wait: Callable[[], None] | None = None


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    calls: int


def time_on_gpu(calls: Mapping[str, Call], rounds: int = 5) -> dict[str, Timing | str]:
    """Time several calls against each other.

    Args:
        calls: by name; each launches its work on the current stream and returns a tensor.
        rounds: every round replays each graph twice and times the second.

    Returns:
        A timing by name, or the reason why one could not run.
    """
    captured: dict[str, _Captured] = {}
    eager: dict[str, float] = {}
    results: dict[str, Timing | str] = {}
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                eager[name] = _eager_seconds(call)
                captured[name] = _capture(call, _calls_in_graph(call, eager[name]))
            except Exception as error:  # peers raise all kinds of things, and the rest must go on
                results[name] = reason_of(error, caught)
                torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in captured}
    for order in orders(list(captured), rounds):
        for name in order:
            if name in results:
                continue
            try:
                samples[name].append(_replay_seconds(captured[name]))
            except Exception as error:  # such as no memory left for the graph to be set up
                results[name] = first_line(error)
                del samples[name]
                torch.cuda.synchronize()
    for name, values in samples.items():
        results[name] = Timing(statistics.median(values), tuple(values), eager[name])
    return results


def time_passes_on_gpu(
    passes: Mapping[str, Passes], rounds: int, stream: torch.cuda.Stream
) -> dict[str, Timing | str]:
    """Time several backward passes against each other.

    Args:
        passes: by name.
        rounds: every round times the backward by a graph, as `time_on_gpu` does, and both passes
            by the clock, eagerly.
        stream: on which the outputs were computed. autograd computes gradients there, so that the
            graphs can hold nothing else.

    Returns:
        A timing by name, or the reason why one could not run. The median of the rounds counts.
    """
    captured: dict[str, _Captured | None] = {}
    results: dict[str, Timing | str] = {}
    for name, own in passes.items():
        try:
            with torch.cuda.stream(stream):
                seconds = _eager_seconds(own.backward, own.wait)
                _eager_seconds(own.step, own.wait)
                captured[name] = None
                if own.wait is None:
                    calls = _calls_in_graph(own.backward, seconds, stream)
                    captured[name] = _capture(own.backward, calls, stream)
        except Exception as error:  # peers raise all kinds of things, and the rest must go on
            captured.pop(name, None)
            results[name] = first_line(error)
            torch.cuda.synchronize()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in captured}
    for order in orders(list(captured), rounds):
        for name in (name for name in order if name in samples):
            entry, own = captured[name], passes[name]
            try:
                with torch.cuda.stream(stream):
                    if entry is None:
                        backward = _eager_seconds(own.backward, own.wait, warm_ups=1)
                    else:
                        backward = _replay_seconds(entry)
                    samples[name].append((backward, _eager_seconds(own.step, own.wait, 1)))
            except Exception as error:  # such as no memory left for the graph to be set up
                results[name] = first_line(error)
                del samples[name]
                torch.cuda.synchronize()
    for name, values in samples.items():
        backwards, steps = zip(*values, strict=True)
        median = statistics.median(backwards)
        by_graph = captured[name] is not None
        results[name] = Timing(median, backwards, statistics.median(steps), by_graph)
    return results


def time_passes_on_cpu(passes: Mapping[str, Passes], rounds: int) -> dict[str, Timing | str]:
    """Time backward passes on the CPU, as `time_on_cpu` does; with their forwards, too."""
    backwards = time_on_cpu({name: own.backward for name, own in passes.items()}, rounds)
    steps = time_on_cpu({name: own.step for name, own in passes.items()}, rounds)
    results: dict[str, Timing | str] = {}
    for name, backward in backwards.items():
        step = steps[name]
        if isinstance(backward, str) or isinstance(step, str):
            results[name] = backward if isinstance(backward, str) else str(step)
        else:
            results[name] = Timing(backward.median, backward.rounds, step.median, False)
    return results


def orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Return all names once a round, in an order that differs from round to round, not from run to
    run."""
    shuffle = random.Random(0)
    for _ in range(rounds):
        yield shuffle.sample(names, len(names))


def quick_seconds(call: Call, replays: int = 3) -> float:
    """Return the seconds of a call on the GPU, measured in little time: to tell what is worth
    `time_on_gpu`.

    Args:
        call: as there.
        replays: of a graph, each after one that warms up; the fastest counts.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()  # which may load the kernel
    start.record()
    call()
    end.record()
    end.synchronize()
    if start.elapsed_time(end) * 1e-3 >= _LONG_CALL_SECONDS:
        captured = _capture(call, 1)
    else:
        captured = _capture(call, _TRIAL_CALLS)
        seconds = _replay_seconds(captured)
        if seconds * _TRIAL_CALLS < _QUICK_GRAPH_SECONDS:
            calls = min(_QUICK_CALLS_IN_GRAPH, round(_QUICK_GRAPH_SECONDS / max(seconds, 1e-9)))
            captured = _capture(call, calls)
    return min(_replay_seconds(captured) for _ in range(replays))


def _eager_seconds(call: Call, wait: Callable[[], None] | None = None, warm_ups: int = 3) -> float:
    """Return seconds per call, back to back, after a warm-up that also compiles and fills
    caches."""
    wait = torch.cuda.synchronize if wait is None else wait
    for _ in range(warm_ups):
        call()
    wait()
    count, elapsed = 1, 0.0
    while elapsed < 5e-3 and count < 1000:
        count *= 4
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        elapsed = time.perf_counter() - start
    return elapsed / count


def _calls_in_graph(
    call: Call, eager_seconds: float, stream: torch.cuda.Stream | None = None
) -> int:
    seconds = eager_seconds
    if seconds < _LONG_CALL_SECONDS:
        seconds = _replay_seconds(_capture(call, _TRIAL_CALLS, stream))
    return max(1, min(_MAX_CALLS_IN_GRAPH, round(_GRAPH_SECONDS / max(seconds, 1e-9))))


def _capture(call: Call, calls: int, stream: torch.cuda.Stream | None = None) -> _Captured:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return _Captured(graph, calls)


def _replay_seconds(entry: _Captured) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    entry.graph.replay()
    start.record()
    entry.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / entry.calls


def time_on_cpu(calls: Mapping[str, Call], rounds: int = 5) -> dict[str, Timing | str]:
    """Time calls on the CPU: every round times one call of each, after a warm-up."""
    results: dict[str, Timing | str] = {}
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            call()
            samples[name] = []
        except Exception as error:
            results[name] = first_line(error)
    for _ in range(rounds):
        for name, values in samples.items():
            start = time.perf_counter()
            calls[name]()
            values.append(time.perf_counter() - start)
    for name, values in samples.items():
        results[name] = Timing(statistics.median(values), tuple(values))
    return results


def first_line(error: Exception) -> str:
    """Return what an exception says, short enough for a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def reason_of(error: Exception, caught: Sequence[warnings.WarningMessage]) -> str:
    """Return `first_line`, and the reason that torch's SDPA gives in warnings only: one about each
    backend, of which those that were not asked for are "disabled"."""
    texts = (str(warning.message).partition(" (Triggered")[0] for warning in caught)
    why = [
        text
        for text in texts
        if "not used because" not in text and "disabled" not in text and "selected" not in text
    ]
    is_sdpa = "No available kernel" in str(error)
    return first_line(RuntimeError(why[0])) if is_sdpa and why else first_line(error)
