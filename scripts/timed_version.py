"""Time calls of the flashcore that PYTHONPATH leads to, for scripts/compare_speed.py.

Questions come by standard input, answers go to standard output, one JSON object a line:
{"workload": its fields, "num_calls": 0 or of a replay} prepares a shape and is answered by
{"num_calls": of a replay}; {} replays it and is answered by {"seconds": a call}. What goes wrong is
answered by {"error": in words}. Of flashcore only two public functions are used, which versions
have in common; the shapes are those of the file that is given as the argument.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_REPLAY_SECONDS = 2e-3  # a replay holds so many calls that it takes about this long
_MAX_CALLS = 200
Call = Callable[[], object]
Replay = Callable[[], float]


def _workloads(path: str) -> ModuleType:
    """Return the module of a file that may lie in another checkout than the flashcore in use."""
    spec = importlib.util.spec_from_file_location("workloads_of_both", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call_of(workload: Any, device: str) -> Call:
    """Return a forward pass of a workload, as `flashcore bench` times it."""
    import flashcore

    q, k, v = workload.tensors(device)
    options: dict[str, Any] = {
        "causal": workload.causal,
        "window": workload.window,
        "softcap": workload.softcap,
    }
    if workload.lengths is None:
        mask = workload.mask_tensor(device)
        return lambda: flashcore.attention(q, k, v, mask=mask, **options)
    ends = torch.tensor((0, *workload.lengths)).cumsum(0).to(device, torch.int32)
    q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))
    longest = max(workload.lengths)
    return lambda: flashcore.attention_varlen(q, k, v, ends, ends, longest, longest, **options)


def prepare(call: Call, num_calls: int) -> tuple[int, Replay]:
    """Compile and warm up.

    Args:
        call: is timed.
        num_calls: of a replay; 0: as many as take about 2 ms.

    Returns:
        num_calls, and a function that replays so many and returns seconds per call.
    """
    for _ in range(3):
        call()
    if not torch.cuda.is_available():

        def by_clock() -> float:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started

        return 1, by_clock
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(work: Callable[[], Any]) -> float:
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    if not num_calls:
        num_calls = max(1, min(_MAX_CALLS, round(_REPLAY_SECONDS / timed(call))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(num_calls):
            call()
    graph.replay()
    return num_calls, lambda: timed(graph.replay) / num_calls


def main(path: str) -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload_type = _workloads(path).Workload
    replay: Replay | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any]
        try:
            if "workload" in asked:
                replay = None  # frees the tensors of the last one
                fields = {
                    name: tuple(value) if isinstance(value, list) else value
                    for name, value in asked["workload"].items()
                }
                num_calls, replay = prepare(
                    call_of(workload_type(**fields), device), asked["num_calls"]
                )
                answer = {"num_calls": num_calls}
            elif replay is None:
                answer = {"error": "no workload is prepared"}
            else:
                answer = {"seconds": replay()}
        except Exception as error:  # whatever a version raises, other workloads go on
            replay = None
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
