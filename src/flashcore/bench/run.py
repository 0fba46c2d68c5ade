"""Run the benchmark: every workload through every library, with errors, ceilings and conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashcore.base import env
from flashcore.bench import backward, ceilings
from flashcore.bench.checking import Slices
from flashcore.bench.document import head
from flashcore.bench.libraries import Call, Library, cpu_libraries, gpu_libraries
from flashcore.bench.peers import find_peers
from flashcore.bench.reporting.summary import summarize
from flashcore.bench.timing import Timing, first_line, time_on_cpu, time_on_gpu
from flashcore.bench.workloads import GROUPS, Workload, cpu_shapes, sweep
from flashcore.ops import eager
from flashcore.selection import tile_table, tuned


def workloads_for(
    device: str,
    quick: bool = False,
    groups: Sequence[str] | None = None,
    is_backward: bool = False,
) -> list[Workload]:
    """Return the shapes a run covers on a device.

    Args:
        device: "cuda" or "cpu".
        quick: the seed's shape and a short sweep, unless `groups` says otherwise.
        groups: keys of GROUPS, or None for all; of the backward's own groups, or None for its
            sweep.
        is_backward: of the backward pass.
    """
    if device == "cpu":
        return cpu_shapes()
    if is_backward:
        names = ("sweep",) if groups is None else groups
        of_groups = [
            backward.sweep(quick) if name == "sweep" else backward.GROUPS[name]() for name in names
        ]
        return [shape for shapes in of_groups for shape in shapes]
    if groups is None and quick:
        groups = ("seed", "sweep")
    chosen: list[Workload] = []
    for group in GROUPS if groups is None else groups:
        chosen += sweep(quick) if group == "sweep" else GROUPS[group]()
    return chosen


def run(
    device: str,
    *,
    rounds: int = 5,
    workloads: Sequence[Workload] | None = None,
    without: Sequence[str] = (),
    minutes: float | None = None,
    is_backward: bool = False,
    on_step: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        device: "cuda" or "cpu".
        rounds: timed rounds; the median counts.
        workloads: the shapes, or None for all.
        without: names of libraries to leave out.
        minutes: after so long no other shape is begun; those left say so in the results.
        is_backward: time gradients of q, k and v, and both passes together, host included.
        on_step: called with the name of each workload before it runs.

    Returns:
        A document of plain values: launcher ("python" or "compiled": what makes eager calls), pass
        ("forward" or "backward"), date, command, machine, ceilings, tuned (whether tiles found by
        `flashcore tune` were there to be used), tile_table (date of the table that ships, if it
        was), left_out (libraries that are not here, and why), summary (see summary.py), results
        (one object for each workload and library, seconds and errors, or the reason why it did not
        run).
    """
    on_gpu = device == "cuda"
    libraries = cpu_libraries()
    left_out: list[dict[str, str]] = []
    if is_backward:
        libraries, left_out = backward.find_libraries(device)
    elif on_gpu:
        peers, left_out = find_peers()
        libraries = gpu_libraries() + peers
    names = [library.name for library in libraries] + [entry["library"] for entry in left_out]
    unknown = f"no library has that name here; there are {', '.join(names)}"
    for name in without:
        reason = "not asked for" if name in names else unknown
        left_out.append({"library": name, "reason": reason})
    libraries = [library for library in libraries if library.name not in without]
    if workloads is None:
        workloads = workloads_for(device, is_backward=is_backward)
    run_workload = backward.run_workload if is_backward else _run_workload
    launched_by = eager.launched_by(device)
    begun = time.monotonic()
    on_step("ceilings")
    limits = ceilings.measure(device, torch.float16 if on_gpu else torch.float32)
    results: list[dict[str, Any]] = []
    for workload in workloads:
        if minutes is not None and time.monotonic() - begun >= 60 * minutes:
            reason = f"not begun within {minutes:g} minutes"
            results += [library.row(workload) | {"skipped": reason} for library in libraries]
            continue
        on_step(workload.name)
        try:
            results += run_workload(workload, libraries, device, rounds, limits)
        except Exception as error:  # such as no memory for its tensors; what is measured is kept
            reason = first_line(error)
            results += [library.row(workload) | {"skipped": reason} for library in libraries]
    return head("bench", device, _method(on_gpu, rounds, is_backward, launched_by)) | {
        "launcher": launched_by,
        "pass": "backward" if is_backward else "forward",
        "ceilings": limits,
        "tuned": on_gpu and env.tuned() and bool(tuned.read(tuned.path_for(tuned.gpu_arch()))),
        "tile_table": _tile_table_date() if on_gpu else None,
        "left_out": left_out,
        "summary": summarize(results),
        "results": results,
    }


def _method(on_gpu: bool, rounds: int, is_backward: bool, launched_by: str) -> str:
    what = "gradients of q, k and v by autograd; " if is_backward else ""
    if not on_gpu:
        return f"{what}one call a round, libraries in turn, median of {rounds} rounds"
    text = (
        f"{what}CUDA graph replays, libraries in a new order every round, median of {rounds} "
        "rounds, warm L2"
    )
    calls = f"eager calls back to back, flashcore's by the {launched_by} launcher"
    return text + (f"; forward and backward together by the clock, {calls}" if is_backward else "")


def joined(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one document with the results of several, that were measured in parts.

    Args:
        documents: of one machine and one kind; the date and the ceilings are the first one's, and
            the command is all of theirs.

    Raises:
        ValueError: they are of different machines, versions or passes, or have a shape in common.
    """
    first, *others = documents
    results = list(first["results"])
    for other in others:
        for name in ("pass", "device", "cpu", "versions", "launcher"):
            if first.get(name) != other.get(name):
                raise ValueError(f"{name} differs: {first.get(name)} and {other.get(name)}")
        if (first["gpu"] or {}).get("name") != (other["gpu"] or {}).get("name"):
            raise ValueError(f"gpu differs: {first['gpu']} and {other['gpu']}")
        known = {(row["group"], row["workload"]) for row in results}
        for row in other["results"]:
            if (row["group"], row["workload"]) in known:
                raise ValueError(f"{row['group']}: {row['workload']} was measured in both")
        results += other["results"]
    commands = "; ".join(dict.fromkeys(document["command"] for document in documents))
    return first | {"command": commands, "results": results, "summary": summarize(results)}


def _tile_table_date() -> str | None:
    table = tile_table.read(tuned.gpu_arch()) if env.tile_table() else None
    return None if table is None else str(table.about["date"])


def _run_workload(
    workload: Workload,
    libraries: Sequence[Library],
    device: str,
    rounds: int,
    limits: dict[str, float],
) -> list[dict[str, Any]]:
    q, k, v = workload.tensors(device)
    mask = workload.mask_tensor(device)
    calls: dict[str, Call] = {}
    outcomes: dict[str, Timing | str] = {}
    for library in libraries:
        reason = library.skip_reason(workload)
        if reason is None:
            try:
                calls[library.name] = library.prepare(workload, q, k, v, mask)
            except Exception as error:  # of a peer, such as a version that does not know a shape
                reason = first_line(error)
        if reason is not None:
            outcomes[library.name] = reason
    with torch.no_grad():
        outcomes |= (time_on_gpu if device == "cuda" else time_on_cpu)(calls, rounds)
        expected = Slices(workload, q, k, v, mask)
        rows = []
        for library in libraries:
            outcome = outcomes[library.name]
            row = library.row(workload)
            if isinstance(outcome, str):
                row["skipped"] = outcome
            else:
                try:
                    row |= expected.errors(calls[library.name]())
                    row |= ceilings.figures(workload.flops, workload.num_bytes, outcome, limits)
                except Exception as error:  # such as a result of another shape
                    row["skipped"] = first_line(error)
            rows.append(row)
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows
