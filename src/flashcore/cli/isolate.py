"""`flashcore isolate` runs the kernel stage by stage and names the first wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashcore.cli import options as o
from flashcore.cli.output import JsonFlag, Output, command, seconds, table, to_json, usage_errors

if TYPE_CHECKING:
    from flashcore.checks.paged_cases import PagedCase
    from flashcore.checks.varlen_cases import VarlenCase
    from flashcore.isolate.isolation import Isolation, StageResult
    from flashcore.problem.case import Case

_STATUS = {
    "ok": "[green]right[/]",
    "wrong": "[red]WRONG[/]",
    "alarm": "[red]ALARM[/]",
    "not compiled": "[red]NO CODE[/]",
}


def isolate(
    ctx: typer.Context,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="auto (the GPU's best kernel, else sim), sim, or a kernel, wmma or sm90: on a GPU "
            "that runs it, else simulated.",
        ),
    ] = "auto",
    plant: Annotated[
        str | None,
        typer.Option("--plant", help="Plant this bug first and simulate; --plant list names them."),
    ] = None,
    batch: o.Batch = 1,
    heads: o.Heads = 2,
    heads_kv: o.HeadsKv = None,
    seqlen: Annotated[
        int | None,
        typer.Option("--seqlen", "-s", min=0, help="Query length; default: 150, with sm90 300."),
    ] = None,
    seqlen_k: o.SeqlenK = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            "--head-dim", "-d", min=1, help="head_dim of q and k; default: 64, with sm90 96."
        ),
    ] = None,
    head_dim_v: o.HeadDimV = None,
    dtype: o.Dtype = "float16",
    causal: o.Causal = False,
    upper_left: o.UpperLeft = False,
    window: o.WindowOption = None,
    softcap: o.Softcap = None,
    scale: o.Scale = None,
    mask: o.Mask = "none",
    sinks: o.Sinks = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="The gradients of q, k and v instead of the output.")
    ] = False,
    arch: Annotated[
        str | None, typer.Option("--arch", help="Simulate the kernel of this GPU, such as sm_90.")
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(
            "--tile",
            metavar="MxN,FIELD,..",
            help="Run with this tile, such as 128x64,ping_pong,num_stages=3; `list` names those "
            "that ship. With --backward that of the kernel of dk and dv (with also_dq of dq too), "
            "behind dq: that of the kernel of dq.",
        ),
    ] = None,
    seed: o.Seed = 0,
    drawn_case: Annotated[
        int | None,
        typer.Option(
            "--case",
            min=0,
            help="Take apart this case of `verify --seed`, with its shape, options and tile; with "
            "--backward of `verify --backward --seed`.",
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the kernel stage by stage and name the first stage that is wrong.

    Every stage is compiled from the kernel's own source with a debug gate: Q@K^T, the online
    softmax, P@V (with P = 1/S every output row must be identical), one key tile, P@V in one warp
    (portable kernel only), and the whole kernel. Each result is compared with a float64 model. The
    first bad value is named with its tile, warp, lane and accumulator element, and a picture shows
    where errors sit. In the simulator races, deadlocks and bad accesses count as well. Exit status
    1 when a stage is wrong. A planted bug comes with the shape, options and tile that show it,
    which options given here replace.

    With --backward, or a bug of a backward kernel, the stages are those of the backward kernels
    for Hopper: delta, dS (in each kernel that computes it), dV of a P that is given, dK and dQ of
    a dS that is given, and the whole kernels.

    Examples:

        flashcore isolate

        flashcore isolate --plant pv-atomic

        flashcore isolate --backend sm90 --plant early-release

        flashcore isolate --plant scale-forgotten

        flashcore isolate --backward --backend sim --causal

        flashcore isolate --backward --backend sim --seed 0 --case 7

        flashcore isolate --backend sim --arch sm_90 --causal --tile 192x64,ping_pong

        flashcore isolate --backend sim --arch sm_90 --seed 0 --case 7
    """
    with command(json_output) as out:
        from flashcore.checks.planned import parse_tile
        from flashcore.cli.calls import isolate as call
        from flashcore.isolate import gates
        from flashcore.kernels.bwd_sm90.plan import DQ_KERNEL
        from flashcore.kernels.registry import BY_NAME
        from flashcore.kernels.stage import Stage

        if plant == "list":
            _list_plants(out)
        number, asked = None if arch is None else o.parse_archs(arch)[0], backend
        with usage_errors():
            if backward and (tile or "").startswith("dq:"):
                assert tile is not None
                tile = tile.removeprefix("dq:")
                backend, _ = call.where(out, backend, plant, number, backward)
                kernel = DQ_KERNEL
            else:
                backend, kernel = call.where(out, backend, plant, number, backward)
        if tile == "list":
            _list_tiles(out, kernel)
        with usage_errors():
            wanted = None if tile is None else parse_tile(tile)
            planted = gates.find_plant(plant, backend, kernel)
        case: Case | VarlenCase | PagedCase
        more: dict[str, Any] = {}
        if drawn_case is not None:
            case, seed, more = call.drawn(
                seed, drawn_case, asked, kernel, number, is_on_gpu=backend != "sim"
            )
            if wanted is None:
                wanted = more.get("tile")
        else:
            case = given = o.make_case(
                batch=batch,
                heads=heads,
                heads_kv=heads_kv,
                seqlen=BY_NAME[kernel].shown_sizes[0] if seqlen is None else seqlen,
                seqlen_k=seqlen_k,
                head_dim=BY_NAME[kernel].shown_sizes[1] if head_dim is None else head_dim,
                head_dim_v=head_dim_v,
                dtype=dtype,
                causal=causal,
                upper_left=upper_left,
                window=window,
                softcap=softcap,
                scale=scale,
                mask=mask,
                sinks=sinks,
                seed=seed,
            )
            if planted is not None:
                case = planted.case(given, call.given_fields(ctx, planted))
        with out.progress(f"Isolating on {backend}", total=len(BY_NAME[kernel].stages)) as advance:
            started = False

            def on_stage(stage: Stage) -> None:
                nonlocal started
                advance(1 if started else 0, f"{stage.name}: {stage.title}")
                started = True

            with usage_errors():
                found = gates.isolate(
                    case,
                    backend,
                    seed=seed,
                    plant=plant,
                    arch=number,
                    kernel=kernel,
                    tile=wanted,
                    on_stage=on_stage,
                    **{name: x for name, x in more.items() if name != "tile"},
                )
        _show(out, found)
        out.finish({**to_json(found), "ok": found.ok}, ok=found.ok)


def _part_of(kernel: str) -> str:
    """Return what the stages of a kernel are, in a word."""
    from flashcore.kernels.registry import BY_NAME

    return "gate" if BY_NAME[kernel].gates else "tensor"


def _list_plants(out: Output) -> None:
    from rich.table import Table

    from flashcore.isolate.registry import all_planted
    from flashcore.sim.plants import index

    every = [(planted.plant, planted.kernel, planted.stage) for planted in all_planted()]
    # Kernels that are no attention have one stage, and tests of their own.
    for kernel, plants in index.BESIDE.items():
        every += [(plant, kernel, "-") for plant in plants.values()]
    listed = Table(title="Bugs that --plant puts into a kernel", title_justify="left", box=None)
    for name in ("name", "kernel", "stage", "caught by", "what"):
        listed.add_column(name, overflow="fold")
    for bug, kernel, stage in every:
        listed.add_row(bug.name, kernel, stage, bug.caught_by, bug.title)
    out.print(listed)
    out.finish([to_json(bug) | {"kernel": kernel, "stage": stage} for bug, kernel, stage in every])


def _list_tiles(out: Output, kernel: str) -> None:
    from flashcore.checks.drawing import shipped_tiles
    from flashcore.checks.planned import format_tile

    tiles = [format_tile(tile) for tile in shipped_tiles(kernel)]
    for tile in tiles:
        out.print(tile, wrap=False)
    out.finish(tiles)


def _show(out: Output, found: Isolation) -> None:
    from flashcore.checks.planned import format_tile

    planted = f", planted bug: {found.plant}" if found.plant else ""
    where = f"{found.kernel} on {found.backend}"
    tile = f", tile {format_tile(found.tile)}" if found.tile else ""
    out.print(f"{found.case.describe()}{tile}, {where}, seed {found.seed}{planted}")
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
    part = _part_of(found.kernel)
    out.print(table(None, [part, "stage", "result", "error / tolerance", "took"], rows))
    first = next((result for result in found.stages if not result.ok), None)
    if first is None:
        out.print("[green]all stages are right[/]")
        return
    if found.first_wrong == "compile":
        alone = "" if found.stages[-1].status == "not run" else "'s gates alone do not compile:"
        out.print(f"[bold red]the kernel{alone or ' does not compile'} ({part} {first.stage})[/]")
        for reason in found.why:
            out.print(f"- {reason}".replace("[", "\\["), wrap=False)
        if first.alarm is not None:
            out.print(f"\n{first.alarm.text}".replace("[", "\\["), wrap=False)
        return
    first = next(r for r in found.stages if r.status in ("wrong", "alarm"))
    title = next((r.title for r in found.stages if r.stage == found.first_wrong), None)
    name = found.first_wrong if title is None else f"{title} ({part} {found.first_wrong})"
    out.print(f"[bold red]first wrong stage: {name}[/]")
    for reason in found.why:
        out.print(f"- {reason}".replace("[", "\\["))
    bad = first.first_bad_check()
    if bad is not None and bad.first is not None:
        out.print(f"\nfirst bad value of {bad.name}:")
        out.print(bad.first.describe().replace("[", "\\["), wrap=False)
        out.print(f"\n{bad.picture}".replace("[", "\\["), wrap=False)
    if first.alarm is not None and first.alarm.place:
        out.print(f"\n{first.alarm.place}\n{first.alarm.picture}".replace("[", "\\["), wrap=False)
    if first.alarm is not None:
        out.print(f"\n{first.alarm.text}".replace("[", "\\["), wrap=False)


def _numbers(result: StageResult) -> str:
    if not result.checks:
        return "-"
    worst = max(result.checks, key=lambda check: (not check.ok, check.max_ratio))
    text = f"{worst.max_ratio:.2g} ({worst.name})"
    return text if worst.ok else f"{text}, {worst.wrong} of {worst.total} wrong"
