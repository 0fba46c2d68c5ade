"""`flashcore bench-host` measures what an eager call costs the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flashcore.cli.output import JsonFlag, command, table, to_json


def bench_host(
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; odd is best.")] = 9,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write this JSON file, and a .md beside it."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Time what a small eager call costs the host, beside torch's SDPA, and its layers.

    On a GPU: B1 H8 S512 D64 in float16, without and with autograd recording; host time of a call,
    and its latency with a wait behind it; flashcore-compiled is the launcher that
    FLASHCORE_LAUNCHER=compiled asks for. Then every road to a launch: masks, lengths, drop-in
    functions, forward and backward, each with the share of its peer's time that it may take.
    Without a GPU: the CPU path with next to nothing to compute.

    Examples:

        flashcore bench-host

        flashcore bench-host --output benchmarks/results/h200-host.json
    """
    with command(json_output) as out:
        import torch

        from flashcore.bench import host, host_roads

        device = "cuda" if torch.cuda.is_available() else "cpu"
        document = host.run(device, rounds)
        roads = document["roads"]
        for recorded in (False, True):
            rows = [
                [row["library"], f"{row['host_us']:.1f}", f"{row['latency_us']:.1f}"]
                for row in document["results"]
                if row["recorded"] == recorded and "host_us" in row
            ]
            title = "recorded by autograd" if recorded else "without autograd"
            out.print("", table(f"us a call, {title}", ["library", "host", "latency"], rows))
        layers = [[entry["layer"], f"{entry['us']:.2f}"] for entry in document["layers"]]
        out.print("", table("layers of a flashcore call", ["layer", "us"], layers))
        out.print("", table("host us of every road", host_roads.HEADINGS, host_roads.cells(roads)))
        for row in roads:
            if "skipped" in row:
                out.print(f"{row['road']} did not run: {row['skipped']}", wrap=False)
        for row in document["results"]:
            if "skipped" in row:
                out.print(f"{row['library']} did not run: {row['skipped']}", wrap=False)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(to_json(document), indent=1) + "\n")
            output.with_suffix(".md").write_text(host.markdown(document) + "\n")
            out.note(f"wrote {output} and {output.with_suffix('.md')}")
        out.finish(
            document,
            ok=not any(
                row["library"] == "flashcore" and "skipped" in row for row in document["results"]
            ),
        )
