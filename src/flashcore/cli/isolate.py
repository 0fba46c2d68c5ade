"""`flashcore isolate`: run the kernel stage by stage and name the first wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.cli import options as o
from flashcore.cli.output import JsonFlag, Output, command, seconds, table, usage_errors

if TYPE_CHECKING:
    from flashcore.gates import Isolation, StageResult

_STATUS = {"ok": "[green]right[/]", "wrong": "[red]WRONG[/]", "alarm": "[red]ALARM[/]"}


def isolate(
    backend: Annotated[
        str, typer.Option("--backend", help="auto (wmma on a GPU, else sim), sim or wmma.")
    ] = "auto",
    plant: Annotated[
        str | None,
        typer.Option("--plant", help="Plant this bug first (simulator); --plant list names them."),
    ] = None,
    batch: o.Batch = 1,
    heads: o.Heads = 2,
    heads_kv: o.HeadsKv = None,
    seqlen: o.Seqlen = 150,
    seqlen_k: o.SeqlenK = None,
    head_dim: o.HeadDim = 64,
    head_dim_v: o.HeadDimV = None,
    dtype: o.Dtype = "float16",
    causal: o.Causal = False,
    upper_left: o.UpperLeft = False,
    window: o.WindowOption = None,
    softcap: o.Softcap = None,
    scale: o.Scale = None,
    mask: o.Mask = "none",
    arch: Annotated[
        str | None, typer.Option("--arch", help="Simulate the kernel of this GPU, such as sm_75.")
    ] = None,
    seed: o.Seed = 0,
    json_output: JsonFlag = False,
) -> None:
    """Run the kernel stage by stage and name the first stage that is wrong.

    Every stage is compiled from the kernel's own source with a debug gate: Q@K^T, the online
    softmax, P@V (with P = 1/S every output row must be identical), one key tile, P@V in one
    warp, and the whole kernel. Each result is compared with a float64 model. The first bad value is
    named with its tile, warp, lane and accumulator element, and a picture shows where errors sit.
    In the simulator races, deadlocks and bad accesses count as well. Exit status 1 when a stage is
    wrong.

    Examples:

        flashcore isolate

        flashcore isolate --backend sim --plant pv-atomic

        flashcore isolate --backend wmma --seqlen 1000 --head-dim 128 --causal
    """
    with command(json_output) as out:
        import torch

        from flashcore import gates
        from flashcore.stages import STAGES, Stage

        if plant == "list":
            _list_plants(out)
        if backend == "auto":
            backend = "wmma" if torch.cuda.is_available() and plant is None else "sim"
        if backend == "wmma" and not torch.cuda.is_available():
            raise typer.BadParameter(
                "--backend wmma needs a GPU and torch sees none (`flashcore doctor` says why); "
                "--backend sim runs the same kernel on the CPU"
            )
        case = o.make_case(
            batch=batch,
            heads=heads,
            heads_kv=heads_kv,
            seqlen=seqlen,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            causal=causal,
            upper_left=upper_left,
            window=window,
            softcap=softcap,
            scale=scale,
            mask=mask,
            seed=seed,
        )
        number = None if arch is None else o.parse_archs(arch)[0]
        with out.progress(f"Isolating on {backend}", total=len(STAGES)) as advance:
            started = False

            def on_stage(stage: Stage) -> None:
                nonlocal started
                advance(1 if started else 0, f"gate {stage.name}: {stage.title}")
                started = True

            with usage_errors():
                found = gates.isolate(
                    case, backend, seed=seed, plant=plant, arch=number, on_stage=on_stage
                )
        _show(out, found)
        out.finish({**_document(found), "ok": found.ok}, ok=found.ok)


def _document(found: Isolation) -> dict[str, object]:
    from flashcore.cli.output import to_json

    document: dict[str, object] = to_json(found)
    return document


def _list_plants(out: Output) -> None:
    from flashcore.sim.plants import PLANTS

    rows = [[name, plant.caught_by, plant.title] for name, plant in PLANTS.items()]
    title = "Bugs that --plant puts into the kernel"
    out.print(table(title, ["name", "caught by", "what"], rows))
    out.finish(list(PLANTS.values()))


def _show(out: Output, found: Isolation) -> None:
    planted = f", planted bug: {found.plant}" if found.plant else ""
    out.print(f"{found.case.describe()} on {found.backend}, seed {found.seed}{planted}")
    rows = [
        [
            result.stage,
            result.title,
            _STATUS.get(result.status, result.status),
            _numbers(result),
            seconds(result.seconds),
        ]
        for result in found.stages
    ]
    out.print(table(None, ["gate", "stage", "result", "error / tolerance", "took"], rows))
    first = next((result for result in found.stages if not result.ok), None)
    if first is None:
        out.print("[green]all stages are right[/]")
        return
    title = next((r.title for r in found.stages if r.stage == found.first_wrong), None)
    name = found.first_wrong if title is None else f"{title} (gate {found.first_wrong})"
    out.print(f"[bold red]first wrong stage: {name}[/]")
    for reason in found.why:
        out.print(f"- {reason}".replace("[", "\\["))
    bad = first.first_bad_check()
    if bad is not None and bad.first is not None:
        out.print(f"\nfirst bad value of {bad.name}:")
        out.print(bad.first.describe().replace("[", "\\["), wrap=False)
        out.print(f"\n{bad.picture}".replace("[", "\\["), wrap=False)
    if first.alarm is not None:
        out.print(f"\n{first.alarm.place}\n{first.alarm.picture}".replace("[", "\\["), wrap=False)
        out.print(f"\n{first.alarm.text}".replace("[", "\\["), wrap=False)


def _numbers(result: StageResult) -> str:
    if not result.checks:
        return "-"
    worst = max(result.checks, key=lambda check: (not check.ok, check.max_ratio))
    text = f"{worst.max_ratio:.2g} ({worst.name})"
    return text if worst.ok else f"{text}, {worst.wrong} of {worst.total} wrong"
