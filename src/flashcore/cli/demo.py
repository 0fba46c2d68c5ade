"""`flashcore demo` runs attention on real input, checked and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashcore.cli.output import JsonFlag, Output, command, seconds, table

if TYPE_CHECKING:
    from torch import Tensor

    from flashcore.checks.accuracy import ErrorReport


@dataclass(frozen=True, slots=True)
class Row:
    """A row shows one implementation. `ours` rows decide the exit status; times in seconds."""

    name: str
    where: str
    ours: bool
    ok: bool
    max_error: float | None = None
    mean_error: float | None = None
    max_limit: float | None = None
    mean_limit: float | None = None
    seconds: float | None = None
    problem: str | None = None


def demo(json_output: JsonFlag = False) -> None:
    """Compute attention on real input, against a float64 oracle and beside torch's SDPA.

    The input is Q, K and V of a layer of the language model all-MiniLM-L6-v2 on three sentences,
    with the padding mask (12 heads of 32, float16). On a GPU the fused WMMA kernel computes it
    there. On a machine without one the same kernel runs in the simulator, and the PyTorch path
    beside it. Exit status 1 when an error is over the tolerance.

    Example:

        flashcore demo
    """
    with command(json_output) as out:
        import torch

        from flashcore.base import machine
        from flashcore.data import load_minilm

        data = load_minilm()
        gpu = machine.gpu()
        device = "cpu" if gpu is None else "cuda"
        q, k, v, mask = (x.to(device) for x in (data.q, data.k, data.v, data.mask))
        shape = f"batch {q.shape[0]}, {q.shape[1]} heads of {q.shape[3]}, {q.shape[2]} tokens"
        out.print(f"[bold]{data.model}[/], layer {data.layer}: {shape}, float16, padding masked")
        for sentence, length in zip(data.sentences, data.lengths, strict=True):
            out.print(f"  {length:3d} tokens: {sentence}", wrap=False)
        with torch.no_grad(), out.progress("Computing", total=3) as advance:
            run = _on_cpu if gpu is None else _on_gpu
            rows = run(q, k, v, mask, data.scale, advance)
        where = machine.cpu_name() if gpu is None else f"{gpu.name} (sm_{gpu.arch})"
        _show(out, rows, where, gpu is not None)
        document = {
            "device": device,
            "hardware": where,
            "model": data.model,
            "shape": list(q.shape),
            "fused_kernel_ran_on": "gpu" if gpu is not None else "simulator",
            "results": rows,
        }
        out.finish(document, ok=all(row.ok for row in rows))


def _on_gpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, advance: Callable[..., None]
) -> list[Row]:
    from flashcore import attention
    from flashcore.bench.timing import Timing, time_on_gpu

    calls: dict[str, Callable[[], Tensor]] = {
        "flashcore": lambda: attention(q, k, v, mask=mask, scale=scale, backend="wmma"),
        "torch SDPA": lambda: _sdpa(q, k, v, mask, scale),
        "torch, unfused": lambda: _unfused(q, k, v, mask, scale),
    }
    timings = time_on_gpu(calls)
    advance()
    rows = []
    for name, call in calls.items():
        timing = timings[name]
        took = timing.median if isinstance(timing, Timing) else None
        label = "flashcore, fused WMMA kernel" if name == "flashcore" else name
        rows.append(_judged(label, "GPU", name == "flashcore", call(), q, k, v, mask, scale, took))
        advance()
    return rows


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, advance: Callable[..., None]
) -> list[Row]:
    from flashcore import attention
    from flashcore.errors import BackendUnavailableError

    rows = []
    name = "flashcore, fused WMMA kernel"
    try:
        simulated = attention(q, k, v, mask=mask, scale=scale, backend="sim")  # compiles
        # The simulator's time says nothing about the kernel's speed, so it is not shown.
        rows.append(_judged(name, "simulator", True, simulated, q, k, v, mask, scale, None))
    except BackendUnavailableError as error:
        rows.append(Row(name, "simulator", True, True, problem=str(error)))
    advance()
    calls: dict[str, Callable[[], Tensor]] = {
        "flashcore, PyTorch path": lambda: attention(
            q, k, v, mask=mask, scale=scale, backend="torch"
        ),
        "torch SDPA": lambda: _sdpa(q, k, v, mask, scale),
        "torch, unfused": lambda: _unfused(q, k, v, mask, scale),
    }
    for label, call in calls.items():
        ours = label.startswith("flashcore")
        result, took = _timed(call)
        rows.append(_judged(label, "CPU", ours, result, q, k, v, mask, scale, took))
        advance()
    return rows


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return a result and the fastest of up to five calls, after one that warms up; half a second
    each."""
    result = call()
    best, spent, calls = float("inf"), 0.0, 0
    while calls < 5 and spent < 0.5:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        best, spent, calls = min(best, took), spent + took, calls + 1
    return result, best


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _unfused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    import torch

    scores = ((q @ k.mT) * scale).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def _judged(
    name: str,
    where: str,
    ours: bool,
    result: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    took: float | None,
) -> Row:
    from flashcore.checks.accuracy import error_report

    report: ErrorReport = error_report(result, q, k, v, mask=mask, scale=scale)
    return Row(
        name,
        where,
        ours,
        report.ok or not ours,
        report.max_error,
        report.mean_error,
        report.max_limit,
        report.mean_limit,
        took,
    )


def _show(out: Output, rows: list[Row], where: str, on_gpu: bool) -> None:
    cells: list[list[Any]] = []
    for row in rows:
        if row.max_error is None or row.mean_error is None:
            cells.append([row.name, row.where, "-", "-", "-", "could not run"])
            continue
        verdict = ("[green]agrees[/]" if row.ok else "[red]WRONG[/]") if row.ours else ""
        took = "-" if row.seconds is None else seconds(row.seconds)
        cells.append(
            [row.name, row.where, f"{row.max_error:.1e}", f"{row.mean_error:.1e}", took, verdict]
        )
    columns = ["implementation", "ran on", "max error", "mean error", "time", "float64 oracle"]
    out.print(table(where, columns, cells))
    limits = next((row for row in rows if row.max_limit is not None), None)
    if limits is not None:
        out.print(
            f"tolerance: max {limits.max_limit:.1e}, mean {limits.mean_limit:.1e} "
            "(twice the error of plain float16 attention, plus 1e-5)"
        )
    for row in rows:
        if row.problem is not None:
            out.print(f"[yellow]{row.name}[/] could not run: {row.problem}", wrap=False)
    if not on_gpu:
        out.print(
            "No GPU here: the fused WMMA kernel, the same source that runs on GPUs, ran in the "
            "simulator on the CPU, which checks its results and its synchronisation, not its speed."
        )
