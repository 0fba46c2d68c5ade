"""`flashcore bench` times flashcore beside PyTorch's own attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashcore.cli import options as o
from flashcore.cli.output import (
    JsonFlag,
    Output,
    command,
    seconds,
    table,
    to_json,
    usage_errors,
)

if TYPE_CHECKING:
    from flashcore.bench.workloads import Workload


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes.")] = False,
    groups: Annotated[
        str | None,
        typer.Option(
            "--groups",
            help="Only these, such as seed,gqa: seed, sweep, gqa, small, window, masked, decode, "
            "decode-more, varlen; with --backward: sweep, gqa, small, window, masked, varlen.",
        ),
    ] = None,
    backward: Annotated[
        bool,
        typer.Option("--backward", help="Gradients of q, k and v, and both passes together."),
    ] = False,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            help='This shape instead or with --groups: "B4 H32/8 S4096 D128 causal"; may be '
            "given several times.",
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option("--match", help="Of these shapes those whose name has this in it, as D64."),
    ] = None,
    drawn: Annotated[
        int | None,
        typer.Option(
            "--random", min=1, help="So many shapes drawn at random, instead or with --groups."
        ),
    ] = None,
    seed: o.Seed = 0,
    without: Annotated[
        str | None,
        typer.Option("--without", help="Leave these libraries out, such as flex,sdpa-math."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; odd is best.")] = 5,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0, help="Begin no shape after this long.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto (a GPU if there is one), cuda or cpu.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write this JSON file, and a .md and a .png beside it."
        ),
    ] = None,
    from_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="Measure nothing: show (and plot) an earlier JSON file, or several that were "
            "measured in parts, as one.",
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Time attention beside every other implementation that is here.

    PyTorch's SDPA with each of its backends (FlashAttention-2 and cuDNN among them), FlexAttention,
    FlashAttention-3 and -4 where they can be imported, and an unfused baseline; what was left out
    is named. On a GPU: the seed's shape, a sweep of 16k tokens, grouped queries, small calls,
    windows, masks and decoding. Kernel times come from CUDA graph replays, the libraries taking
    turns in every round. Errors against float64 stand beside the times, and the limit (measured
    matmul and copy ceilings) beside the fraction of it that was reached. Without a GPU: the CPU
    paths on one small shape.

    With --backward gradients are timed the same way, beside the peers that have a backward pass; on
    a GPU, of 16k tokens with head_dim 64 to 256, unless --groups or --shape says otherwise.
    Operations count 2.5 times the forward's. Forward and backward together are timed by the clock,
    the host included.

    Examples:

        flashcore bench --quick

        flashcore bench --groups small,decode

        flashcore bench --random 40 --seed 1

        flashcore bench --backward --match D128

        flashcore bench --backward --shape "B4 H32/8 S4096 D128 causal window 1024,0"

        flashcore bench --output benchmarks/results/my-gpu.json

        flashcore bench --from benchmarks/results/my-gpu.json
    """
    with command(json_output) as out:
        if from_files:
            document = _load(from_files)
        else:
            where = _device(device)
            chosen = _chosen(where, quick, groups, drawn, seed, shapes or [], match, backward)
            document = _measure(out, where, chosen, without, rounds, minutes, backward)
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


def _groups(text: str | None, device: str, backward: bool) -> list[str] | None:
    from flashcore.bench.backward import GROUPS as BACKWARD_GROUPS
    from flashcore.bench.workloads import GROUPS

    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    known = list(BACKWARD_GROUPS if backward else GROUPS) if device == "cuda" else ["seed"]
    for name in names:
        if name not in known:
            where = "" if device == "cuda" else " (all that there is without a GPU)"
            where += " with --backward" if backward else ""
            raise typer.BadParameter(f"--groups {name} is not one of {', '.join(known)}{where}")
    return names


def _chosen(
    device: str,
    quick: bool,
    groups: str | None,
    drawn: int | None,
    seed: int,
    shapes: list[str],
    match: str | None,
    backward: bool,
) -> list[Workload]:
    """Return the shapes that the command line asks for."""
    from flashcore.bench.random_shapes import random_shapes
    from flashcore.bench.run import workloads_for
    from flashcore.bench.shapes import parse_shape

    if drawn is not None and device == "cpu":
        raise typer.BadParameter(f"--random {drawn} needs a GPU: a CPU would take minutes a shape")
    wanted = _groups(groups, device, backward)
    is_said = drawn is not None or shapes
    chosen = [] if is_said and wanted is None else workloads_for(device, quick, wanted, backward)
    with usage_errors():
        chosen += [parse_shape(text) for text in shapes]
    if drawn is not None:
        chosen += random_shapes(drawn, seed)
    names = [(shape.group, shape.name) for shape in chosen]
    for name in shapes:
        if names.count(("given", parse_shape(name).name)) > 1:
            raise typer.BadParameter(f"--shape {name} is given twice, but for its dtype")
    found = [shape for shape in chosen if match is None or match in shape.name]
    if not found:
        some = ", ".join(shape.name for shape in chosen[:3])
        raise typer.BadParameter(f"--match {match} is in no shape's name, such as {some}")
    return found


def _measure(
    out: Output,
    device: str,
    chosen: list[Workload],
    without: str | None,
    rounds: int,
    minutes: float | None,
    backward: bool,
) -> dict[str, Any]:
    from flashcore.bench.run import run

    names = [name.strip() for name in without.split(",")] if without else []
    if device == "cpu":
        out.note(
            "No GPU: these are the CPU paths on a small shape. They say nothing about the kernels."
        )
    with out.progress(f"Timing on {device}", total=len(chosen) + 1) as advance:
        started = False

        def on_step(name: str) -> None:
            nonlocal started
            advance(1 if started else 0, f"Timing {name}")
            started = True

        return run(
            device,
            rounds=rounds,
            workloads=chosen,
            without=names,
            minutes=minutes,
            is_backward=backward,
            on_step=on_step,
        )


def _show(out: Output, document: dict[str, Any]) -> None:
    from flashcore.bench.reporting import report

    is_backward = document.get("pass") == "backward"
    out.print(report.conditions(document).replace("[", "\\["))
    shapes = dict.fromkeys((row["group"], row["workload"]) for row in document["results"])
    for group, workload in shapes:
        rows = []
        for row in document["results"]:
            if (row["group"], row["workload"]) != (group, workload) or "seconds" not in row:
                continue
            rows.append(
                [
                    row["library"],
                    seconds(row["seconds"]),
                    f"{row['flops_per_second'] / 1e12:.3g}",
                    f"{row['fraction_of_limit']:.0%}",
                    f"{row['max_error']:.1e}",
                    f"{row['mean_error']:.1e}",
                    *([seconds(row["eager_seconds"])] if is_backward else []),
                ]
            )
        columns = ["library", "time", "TFLOP/s", "of limit", "max error", "mean error"]
        columns += ["with forward and host"] if is_backward else []
        out.print("", table(f"{group}: {workload}", columns, rows))
    out.print("", _summary(document))
    for line in report.remarks(document):
        out.print(line.replace("[", "\\["), wrap=False)


def _summary(document: dict[str, Any]) -> Any:
    from flashcore.bench.reporting.report import means

    rows = [
        [
            group,
            found["shapes"],
            f"{found['vs_best_peer']:.2f}x",
            found["ahead"],
            f"{found['least']:.2f}x ({found['least_at']})",
        ]
        for group, found in means(document["results"])
    ]
    title = "flashcore's speed over the best peer's, geometric means"
    return table(title, ["group", "shapes", "mean", "ahead on", "at least"], rows)


def _load(paths: list[Path]) -> dict[str, Any]:
    from flashcore.bench.run import joined

    documents = [_load_one(path) for path in paths]
    try:
        return joined(documents)
    except ValueError as error:
        names = " and ".join(map(str, paths))
        raise typer.BadParameter(f"--from {names} cannot be shown as one: {error}") from error


def _load_one(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--from {path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != 1:
        raise typer.BadParameter(f"--from {path} was not written by flashcore bench (schema 1)")
    return document


def _write(out: Output, document: dict[str, Any], path: Path) -> None:
    from flashcore.bench.reporting import plotting, report

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(document), indent=1) + "\n")
    path.with_suffix(".md").write_text(report.markdown(document))
    out.note(f"wrote {path} and {path.with_suffix('.md')}")
    try:
        plotting.plot(document, path.with_suffix(".png"))
        out.note(f"wrote {path.with_suffix('.png')}")
    except ImportError:
        out.note("no plot: matplotlib is missing (pip install matplotlib)")
    except ValueError as error:
        out.note(f"no plot: {error}")
