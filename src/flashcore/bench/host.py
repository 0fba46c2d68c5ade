"""Measure what an eager call costs the host: flashcore beside torch's SDPA, and flashcore's layers.

Small calls are bound by the host: their kernels are done before the next one is enqueued.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
from flashcore.bench import host_roads
from flashcore.bench.document import head
from flashcore.bench.libraries import Library
from flashcore.bench.peers import find_peers
from flashcore.bench.reporting.report import table
from flashcore.bench.timing import first_line
from flashcore.bench.workloads import Workload, seed_shape
from flashcore.launch import launcher
from flashcore.launch.allocation import allocator
from flashcore.ops import calls, eager
from flashcore.ops import dense as ops
from flashcore.problem.options import Options, Wanted

Call = Callable[[], object]
Entry = tuple[Call, Callable[[], AbstractContextManager[Any]]]  # and a context around many calls

_CALLS = host_roads.CALLS
# On a CPU computing is part of a call, so there should be next to nothing to compute.
_SMALLEST = Workload("seed", 1, 1, 1, 8, False, "float32")
_SDPA = {
    "sdpa": None,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


def run(device: str, rounds: int = 9) -> dict[str, Any]:
    """Measure the host.

    Args:
        device: "cuda" or "cpu".
        rounds: timed rounds, in which everybody takes a turn; the median counts.

    Returns:
        A document of plain values: date, command, machine, results (host_us and latency_us by
        library, without and with autograd recording, or the reason why one did not run), left_out
        (libraries that are not here, and why), layers (us by name) and roads (host_roads.run).
    """
    workload = seed_shape()[0] if device == "cuda" else _SMALLEST
    q, k, v = workload.tensors(device)[:3]
    peers, left_out = find_peers() if device == "cuda" else ([], [])
    results = []
    for recorded in (False, True):
        tensors = [x.detach().requires_grad_(recorded) for x in (q, k, v)]
        entries, failed = _libraries(device, workload, peers, *tensors)
        timings = _times(entries, device, rounds)
        for name, (host, latency) in timings.items():
            results.append(
                {"library": name, "recorded": recorded, "host_us": host, "latency_us": latency}
            )
        results += [
            {"library": name, "recorded": recorded, "skipped": reason}
            for name, reason in failed.items()
        ]
    method = (
        f"{workload.name} {workload.dtype}; host: {_CALLS} calls in a row, not waited for; "
        f"latency: one call, then wait; in turns, median of {rounds} rounds"
    )
    return head("host", device, method) | {
        "left_out": left_out,
        "results": results,
        "layers": _layers(device, q, k, v, rounds),
        "roads": host_roads.run(q, k, v, rounds, lambda call, count: _host_us(call, device, count)),
    }


def _libraries(
    device: str, workload: Workload, peers: Sequence[Library], q: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return what runs, by name; and why others, of those that are meant for such calls, do not."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found: dict[str, Entry] = {
        name: (lambda: flashcore.attention(q, k, v), functools.partial(launcher.using, how))
        for name, how in (("flashcore", "python"), ("flashcore-compiled", "compiled"))
        if how == "python" or device == "cuda"  # what it launches is kernels
    }
    failed = {}
    for name, backend in _SDPA.items():
        if backend is None:
            found[name] = (lambda: sdpa(q, k, v), contextlib.nullcontext)
        elif device == "cuda":
            found[name] = (
                lambda: sdpa(q, k, v),
                lambda backend=backend: sdpa_kernel(backend),  # type: ignore[misc]
            )
    for peer in peers:
        if peer.groups is not None and workload.group not in peer.groups:
            continue
        reason = "compiles for seconds" if peer.compiles_slowly else peer.skip_reason(workload)
        if reason is None:
            try:
                prepared = peer.prepare(workload, q, k, v, None)
                found[peer.name] = (prepared, contextlib.nullcontext)
            except Exception as error:  # whatever a peer raises is a reason to leave it out
                reason = first_line(error)
        if reason is not None:
            failed[peer.name] = reason
    for name, (call, context) in list(found.items()):
        try:
            with context():
                call()
            _wait(device)
        except Exception as error:  # a library may raise anything
            failed[name] = first_line(error)
            del found[name]
    return found, failed


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _times(
    entries: Mapping[str, Entry],
    device: str,
    rounds: int,
) -> dict[str, tuple[float, float]]:
    """Return (host, latency) in microseconds by name."""
    host: dict[str, list[float]] = {name: [] for name in entries}
    latency: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(rounds + 1):  # the first warms up
        for name, (call, context) in entries.items():
            with context():
                call()  # a launcher may start with nothing prepared
                host[name].append(_host_us(call, device))
                latency[name].append(_latency_us(call, device))
    return {
        name: (statistics.median(host[name][1:]), statistics.median(latency[name][1:]))
        for name in entries
    }


def _host_us(call: Call, device: str, count: int = _CALLS) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    _wait(device)
    return elapsed / count * 1e6


def _latency_us(call: Call, device: str, count: int = 50) -> float:
    samples = []
    for _ in range(count):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e6


def _layers(device: str, q: Tensor, k: Tensor, v: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Return the times of the parts of a flashcore call, and what it would cost through the
    dispatcher."""
    call = calls.find(q, k, v, None, False, None, None, None, False, "auto").call
    addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    leaf = q.detach().requires_grad_()
    arguments = (None, None, *Options.checked(False, None, None, None))
    layers: dict[str, Call] = {
        "does anybody need the dispatcher": lambda: eager.needs_dispatcher(q, k, v, None),
        "allocation of out": allocator(q.device, tuple(q.shape), q.dtype),
        "allocation of lse, if wanted": allocator(q.device, tuple(q.shape[:3]), torch.float32),
        **_launch_layers(call, q, k, v),
        "allocations, argument and launch": lambda: call(q, k, v, None, addresses),
        "attention": lambda: flashcore.attention(q, k, v),
        "a description not seen yet, on top": lambda: calls.find(
            q, k, v, None, False, None, None, None, False, "auto"
        ),
        "attention, recorded": lambda: flashcore.attention(leaf, k, v),
        "the operator, without autograd": lambda: ops.forward(
            q, k, v, *arguments, *Wanted(), "auto"
        ),
        "the operator, recorded": lambda: ops.forward(
            leaf, k, v, *arguments, *Wanted(True), "auto"
        ),
    }
    samples: dict[str, list[float]] = {name: [] for name in layers}
    with launcher.using("python"):
        for _ in range(rounds + 1):
            for name, layer in layers.items():
                samples[name].append(_host_us(layer, device))
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    return [{"layer": name, "us": us} for name, us in medians.items()]


def _launch_layers(call: object, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Return the times of a kernel's layers; none where PyTorch computes."""
    if q.device.type != "cuda":
        return {}
    from flashcore.launch.kernel_call import KernelCall

    kernel = getattr(call, "__self__", None)
    assert isinstance(kernel, KernelCall)
    out = torch.empty_like(q)
    key = (
        -1,
        (q.data_ptr(), k.data_ptr(), v.data_ptr()),
        0,
        out.data_ptr(),
        0,
        (),
        kernel.counter(),
    )
    argument = kernel.make_argument(key)
    return {
        "new addresses: argument and descriptors": lambda: kernel.make_argument(key),
        "launch": lambda: kernel.launch(argument),
    }


def markdown(document: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    rows = document["results"]
    timed = [row for row in rows if "host_us" in row]
    lines = []
    for library in dict.fromkeys(row["library"] for row in timed):
        cells = [library]
        for recorded in (False, True):
            found = [r for r in timed if (r["library"], r["recorded"]) == (library, recorded)]
            cells += [f"{found[0][x]:.1f}" if found else "-" for x in ("host_us", "latency_us")]
        lines.append(cells)
    calls = table(["us", "host", "latency", "host, recorded", "latency, recorded"], lines)
    layers = [[entry["layer"], f"{entry['us']:.2f}"] for entry in document["layers"]]
    parts = [calls, _ratios(timed), table(["layer of a flashcore call", "us"], layers)]
    if "roads" in document:  # older documents have none
        parts.insert(2, host_roads.markdown(document["roads"]))
    return "\n\n".join(parts)


def _ratios(rows: Sequence[Mapping[str, Any]]) -> str:
    host = {(row["library"], row["recorded"]): row["host_us"] for row in rows}
    sentences = []
    for name, whose in (
        ("flashcore", "flashcore's"),
        ("flashcore-compiled", "That of its compiled launcher"),
    ):
        parts = [
            f"{host[name, recorded] / host['sdpa', recorded]:.2f} {words}"
            for recorded, words in (
                (False, "without autograd"),
                (True, "with autograd recording"),
            )
            if (name, recorded) in host and ("sdpa", recorded) in host
        ]
        if parts and name == "flashcore":
            sentences.append(f"{whose} host time over that of torch's SDPA: {', '.join(parts)}.")
        elif parts:
            sentences.append(f"{whose}: {', '.join(parts)}.")
    return " ".join(sentences)
