"""`flashcore bench`: time flashcore beside PyTorch's own attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flashcore.cli.output import JsonFlag, Output, command, seconds, table, to_json


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes.")] = False,
    seed_only: Annotated[
        bool, typer.Option("--seed-shape", help="Only the seed's shape, B1 H8 S512 D64.")
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; odd is best.")] = 5,
    device: Annotated[
        str, typer.Option("--device", help="auto (a GPU if there is one), cuda or cpu.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write this JSON file, and a .md and a .png beside it."
        ),
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: show (and plot) an earlier JSON file."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Time attention beside PyTorch's SDPA (each of its backends) and an unfused baseline.

    On a GPU: the seed's shape, and a sweep of 16k tokens with head_dim 64 to 256, full and causal.
    Kernel times come from CUDA graph replays, the libraries taking turns in every round. Errors
    against float64 stand beside the times, and the limit (measured matmul and copy ceilings) beside
    the fraction of it that was reached. Without a GPU: the CPU paths on one small shape.

    Examples:

        flashcore bench --quick

        flashcore bench --output benchmarks/results/my-gpu.json

        flashcore bench --from benchmarks/results/my-gpu.json
    """
    with command(json_output) as out:
        if from_file is not None:
            document = _load(from_file)
        else:
            document = _measure(out, _device(device), quick, seed_only, rounds)
        _show(out, document)
        if output is not None:
            _write(out, document, output)
        ours = [row for row in document["results"] if row["library"] == "flashcore"]
        out.finish(document, ok=all("seconds" in row for row in ours))


def _device(name: str) -> str:
    import torch

    if name not in ("auto", "cuda", "cpu"):
        raise typer.BadParameter(f"--device {name} is not one of auto, cuda, cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch sees no GPU; `flashcore doctor` says why")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _measure(out: Output, device: str, quick: bool, seed_only: bool, rounds: int) -> dict[str, Any]:
    from flashcore.bench.run import run, workloads_for
    from flashcore.bench.workloads import seed_shape

    if device == "cpu":
        out.note(
            "No GPU: these are the CPU paths on a small shape. They say nothing about the kernels."
        )
    chosen = workloads_for(device, quick)
    if seed_only:
        chosen = seed_shape("float16" if device == "cuda" else "float32")
    with out.progress(f"Timing on {device}", total=len(chosen) + 1) as advance:
        started = False

        def on_step(name: str) -> None:
            nonlocal started
            advance(1 if started else 0, f"Timing {name}")
            started = True

        return run(device, quick=quick, rounds=rounds, workloads=chosen, on_step=on_step)


def _show(out: Output, document: dict[str, Any]) -> None:
    from flashcore.bench import report

    out.print(report.conditions(document).replace("[", "\\["))
    workloads = list(dict.fromkeys(row["workload"] for row in document["results"]))
    for workload in workloads:
        rows = []
        for row in (row for row in document["results"] if row["workload"] == workload):
            if "seconds" not in row:
                rows.append([row["library"], "-", "-", "-", "-", "-"])
                continue
            rows.append(
                [
                    row["library"],
                    seconds(row["seconds"]),
                    f"{row['flops_per_second'] / 1e12:.3g}",
                    f"{row['fraction_of_limit']:.0%}",
                    f"{row['max_error']:.1e}",
                    f"{row['mean_error']:.1e}",
                ]
            )
        columns = ["library", "time", "TFLOP/s", "of limit", "max error", "mean error"]
        out.print("", table(workload, columns, rows))
    for line in report.skipped(document):
        out.print(line, wrap=False)


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--from {path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != 1:
        raise typer.BadParameter(f"--from {path} was not written by flashcore bench (schema 1)")
    return document


def _write(out: Output, document: dict[str, Any], path: Path) -> None:
    from flashcore.bench import report

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(document), indent=1) + "\n")
    path.with_suffix(".md").write_text(report.markdown(document))
    out.note(f"wrote {path} and {path.with_suffix('.md')}")
    try:
        report.plot(document, path.with_suffix(".png"))
        out.note(f"wrote {path.with_suffix('.png')}")
    except ImportError:
        out.note("no plot: matplotlib is missing (pip install 'flashcore[bench]')")
    except ValueError as error:
        out.note(f"no plot: {error}")
