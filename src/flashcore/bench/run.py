"""Run the benchmark: every workload through every library, with errors, ceilings and conditions."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashcore.base import env, machine
from flashcore.bench import ceilings
from flashcore.bench.libraries import Call, Library, cpu_libraries, gpu_libraries
from flashcore.bench.peers import find_peers
from flashcore.bench.summary import summarize
from flashcore.bench.timing import Timing, first_line, time_on_cpu, time_on_gpu
from flashcore.bench.workloads import GROUPS, Workload, cpu_shapes, sweep
from flashcore.checks.reference import attention_oracle
from flashcore.selection import tile_table, tuned

# The oracle stores scores in float64, so long sequences are checked on their first and last rows.
_CHECKED_ROWS = 256


def workloads_for(
    device: str, quick: bool = False, groups: Sequence[str] | None = None
) -> list[Workload]:
    """Return the shapes a run covers on a device.

    Args:
        device: "cuda" or "cpu".
        quick: the seed's shape and a short sweep, unless `groups` says otherwise.
        groups: keys of GROUPS, or None for all.
    """
    if device == "cpu":
        return cpu_shapes()
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
    on_step: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        device: "cuda" or "cpu".
        rounds: timed rounds; the median counts.
        workloads: the shapes, or None for all.
        without: names of libraries to leave out.
        minutes: after so long no other shape is begun; those left say so in the results.
        on_step: called with the name of each workload before it runs.

    Returns:
        A document of plain values: date, command, machine, ceilings, tuned (whether tiles found by
        `flashcore tune` were there to be used), tile_table (date of the table that ships, if it
        was), left_out (libraries that are not here, and why),
        summary (see summary.py), results (one object for each workload and library, seconds and
        errors, or the reason why it did not run).
    """
    on_gpu = device == "cuda"
    libraries = cpu_libraries()
    left_out: list[dict[str, str]] = []
    if on_gpu:
        peers, left_out = find_peers()
        libraries = gpu_libraries() + peers
    left_out += [{"library": name, "reason": "not asked for"} for name in without]
    libraries = [library for library in libraries if library.name not in without]
    chosen = list(workloads) if workloads is not None else workloads_for(device)
    begun = time.monotonic()
    on_step("ceilings")
    limits = ceilings.measure(device, torch.float16 if on_gpu else torch.float32)
    results: list[dict[str, Any]] = []
    for workload in chosen:
        if minutes is not None and time.monotonic() - begun >= 60 * minutes:
            reason = f"not begun within {minutes:g} minutes"
            results += [_row(workload, library) | {"skipped": reason} for library in libraries]
            continue
        on_step(workload.name)
        try:
            results += _run_workload(workload, libraries, device, rounds, limits)
        except Exception as error:  # such as no memory for its tensors; what is measured is kept
            reason = first_line(error)
            results += [_row(workload, library) | {"skipped": reason} for library in libraries]
    gpu = machine.gpu() if on_gpu else None
    return {
        "schema": 1,
        "date": machine.now(),
        "command": command_line(),
        "device": device,
        "gpu": None if gpu is None else asdict(gpu),
        "cpu": machine.cpu_name(),
        "versions": machine.versions(),
        "method": (
            "CUDA graph replays, libraries in a new order every round, "
            f"median of {rounds} rounds, warm L2"
            if on_gpu
            else f"one call a round, libraries in turn, median of {rounds} rounds"
        ),
        "ceilings": limits,
        "tuned": on_gpu and env.tuned() and bool(tuned.read(tuned.path_for(tuned.gpu_arch()))),
        "tile_table": _tile_table_date() if on_gpu else None,
        "left_out": left_out,
        "summary": summarize(results),
        "results": results,
    }


def _tile_table_date() -> str | None:
    table = tile_table.read(tuned.gpu_arch()) if env.tile_table() else None
    return None if table is None else str(table.about["date"])


def command_line() -> str:
    """Return the command as typed, without the folders of absolute paths: they mean nothing
    elsewhere."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["flashcore", *words])


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
        expected = _Slices(workload, q, k, v, mask)
        rows = []
        for library in libraries:
            outcome = outcomes[library.name]
            row = _row(workload, library)
            if isinstance(outcome, str):
                row["skipped"] = outcome
            else:
                try:
                    row |= expected.errors(calls[library.name]())
                    row |= _figures(workload, outcome, limits)
                except Exception as error:  # such as a result of another shape
                    row["skipped"] = first_line(error)
            rows.append(row)
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows


def _row(workload: Workload, library: Library) -> dict[str, Any]:
    """Return what a row of the results begins with."""
    row = {"workload": workload.name, **asdict(workload), "library": library.name}
    if workload.group == "window":
        row["window_tiles"] = workload.window_tiles
    return row


def _figures(workload: Workload, timing: Timing, limits: dict[str, float]) -> dict[str, Any]:
    compute = workload.flops / limits["matmul_flops"]
    memory = workload.num_bytes / limits["copy_bytes"]
    limit = max(compute, memory)
    return {
        "seconds": timing.median,
        "rounds_seconds": list(timing.rounds),
        "eager_seconds": timing.eager,
        "flops": workload.flops,
        "bytes": workload.num_bytes,
        "flops_per_second": workload.flops / timing.median,
        "bytes_per_second": workload.num_bytes / timing.median,
        "limit_seconds": limit,
        "limited_by": "compute" if compute >= memory else "memory",
        "fraction_of_limit": limit / timing.median,
    }


class _Slices:
    """Hold the float64 output of the first and last query rows of the first and last head of batch
    0."""

    def __init__(
        self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> None:
        heads_q, heads_kv, length = workload.num_heads, workload.heads_kv, workload.seqlen
        self.heads = sorted({0, heads_q - 1})
        heads_of_k = [head // (heads_q // heads_kv) for head in self.heads]
        count = min(_CHECKED_ROWS, length)
        self.rows = torch.tensor(sorted({*range(count), *range(length - count, length)}))
        self.rows = self.rows.to(q.device)
        self.expected = attention_oracle(
            q[:1, self.heads][:, :, self.rows],
            k[:1, heads_of_k],
            v[:1, heads_of_k],
            softcap=workload.softcap,
            mask=self._bias(workload, mask),
        )[0]

    def _bias(self, workload: Workload, mask: Tensor | None) -> Tensor:
        """Return mask tensor, causality and window as one additive mask of the checked rows."""
        keys = torch.arange(workload.keys, device=self.rows.device)
        ahead = keys[None, :] - (self.rows[:, None] + workload.keys - workload.seqlen)
        left, right = (-1, -1) if workload.window is None else workload.window
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if workload.causal or right >= 0:
            hidden |= ahead > (0 if workload.causal else right)
        if left >= 0:
            hidden |= ahead < -left
        if workload.lengths is not None:
            numbers = torch.arange(len(workload.lengths), device=keys.device)
            lengths = torch.tensor(workload.lengths, device=keys.device)
            sequence = numbers.repeat_interleave(lengths)
            hidden |= sequence[None, :] != sequence[self.rows][:, None]
        bias = torch.zeros(ahead.shape, dtype=torch.float64, device=ahead.device)[None, None]
        if mask is not None:
            shape = (1, workload.num_heads, workload.seqlen, workload.keys)
            part = mask[:1].expand(shape)[:, self.heads][:, :, self.rows]
            if mask.dtype == torch.bool:
                hidden = hidden | ~part
            else:
                bias = part.double()
        return bias.masked_fill(hidden, -torch.inf)

    def errors(self, out: Tensor) -> dict[str, float]:
        """Return largest and mean absolute error of an output."""
        error = (out[:1, self.heads][:, :, self.rows].double() - self.expected).abs()
        return {"max_error": float(error.max()), "mean_error": float(error.mean())}
