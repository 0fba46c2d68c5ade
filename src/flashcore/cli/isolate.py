"""`flashcore isolate` runs the kernel stage by stage and names the first wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.cli import options as o
from flashcore.cli.output import JsonFlag, Output, command, seconds, table, to_json, usage_errors

if TYPE_CHECKING:
    from flashcore.checks.drawing import Drawn
    from flashcore.checks.paged_cases import PagedCase
    from flashcore.checks.varlen_cases import VarlenCase
    from flashcore.isolate.isolation import Isolation, StageResult
    from flashcore.isolate.registry import Planted
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
    arch: Annotated[
        str | None, typer.Option("--arch", help="Simulate the kernel of this GPU, such as sm_90.")
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(
            "--tile",
            metavar="MxN,FIELD,..",
            help="Run with this tile, such as 128x64,ping_pong,num_stages=3; `list` names those "
            "that ship.",
        ),
    ] = None,
    seed: o.Seed = 0,
    drawn_case: Annotated[
        int | None,
        typer.Option(
            "--case",
            min=0,
            help="Take apart this case of `verify --seed`, with its shape, options and tile.",
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
    which options given here replace. Bugs of the backward kernels have no gates: the first wrong
    one of delta, dq, dv and dk is named.

    Examples:

        flashcore isolate

        flashcore isolate --plant pv-atomic

        flashcore isolate --backend sm90 --plant early-release

        flashcore isolate --plant scale-forgotten

        flashcore isolate --backend sim --arch sm_90 --causal --tile 192x64,ping_pong

        flashcore isolate --backend sim --arch sm_90 --seed 0 --case 7
    """
    with command(json_output) as out:
        from flashcore.checks.planned import parse_tile
        from flashcore.isolate import gates
        from flashcore.kernels.registry import BY_NAME
        from flashcore.kernels.stage import Stage

        if plant == "list":
            _list_plants(out)
        number, asked = None if arch is None else o.parse_archs(arch)[0], backend
        with usage_errors():
            backend, kernel = _where(out, backend, plant, number)
        if tile == "list":
            _list_tiles(out, kernel)
        with usage_errors():
            wanted = None if tile is None else parse_tile(tile)
            planted = gates.find_plant(plant, backend, kernel)
        case: Case | VarlenCase | PagedCase
        if drawn_case is not None:
            drawn = _draw(seed, drawn_case, asked, kernel, number)
            case, seed = drawn.case, drawn.case.seed
            wanted = dict(drawn.tile) if wanted is None else wanted
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
                case = planted.case(given, _given(ctx, planted))
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
                )
        _show(out, found)
        out.finish({**to_json(found), "ok": found.ok}, ok=found.ok)


def _where(out: Output, backend: str, plant: str | None, arch: int | None) -> tuple[str, str]:
    """Return the backend to run on, "sim" or a kernel's on the GPU, and the kernel."""
    import torch

    from flashcore.backends.dispatch import KERNELS
    from flashcore.checks.verify import resolve_backend
    from flashcore.isolate import choosing, gates
    from flashcore.kernels.registry import BY_BACKEND

    simulate = plant is not None or arch is not None or not torch.cuda.is_available()
    if backend == "auto":
        backend = "sim" if simulate else resolve_backend("auto")
    asked, kernel = backend, KERNELS.get(backend)
    if kernel is not None and not simulate:
        major, minor = torch.cuda.get_device_capability()
        simulate = not BY_BACKEND[backend].serves(10 * major + minor)
    if kernel is not None and simulate:
        if plant is None and arch is None:
            out.note(f"No GPU that runs {kernel}: simulating it (`flashcore doctor` says more).")
        backend = "sim"
    gates.find_plant(plant, backend)  # raises for an unknown backend or plant
    return backend, choosing.kernel_to_run(asked, plant, arch)


def _draw(seed: int, index: int, backend: str, kernel: str, arch: int | None) -> Drawn:
    """Return a case of `verify`, with the arguments that it had there."""
    from flashcore.backends.dispatch import KERNELS
    from flashcore.base import env
    from flashcore.checks import drawing
    from flashcore.kernels.registry import BY_NAME

    if backend in KERNELS:
        return drawing.draw(seed, index, backend)
    if arch is None:
        arch = BY_NAME[kernel].only_arch or env.sim_arch()
    return drawing.draw(seed, index, "sim", arch)


# Fields of a Case by the options that say what they are.
_FIELDS = {
    "heads": ("num_heads_q", "num_heads_kv"),
    "heads_kv": ("num_heads_kv",),
    "seqlen": ("seqlen_q", "seqlen_k"),
    "head_dim": ("head_dim", "head_dim_v"),
    "upper_left": ("causal",),
    "scale": ("scale", "growth"),
}
_FIELDS |= {name: (name,) for name in (
    "batch", "seqlen_k", "head_dim_v", "dtype", "causal", "window", "softcap", "mask", "sinks",
    "seed",
)}  # fmt: skip


def _given(ctx: typer.Context, planted: Planted) -> set[str]:
    """Return fields of the Case that the command line has. Packed sequences have none of them."""
    options = [
        name
        for name in _FIELDS
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if planted.kind and set(options) - {"seed"}:
        raise typer.BadParameter(
            f"--plant {planted.plant.name} is a bug of {planted.kind}, whose shape is not to be "
            f"given: leave out --{sorted(set(options) - {'seed'})[0].replace('_', '-')}"
        )
    return {field for name in options for field in _FIELDS[name]}


def _part_of(kernel: str) -> str:
    """Return what the stages of a kernel are, in a word."""
    from flashcore.kernels.registry import BY_NAME

    return "gate" if BY_NAME[kernel].gates else "tensor"


def _list_plants(out: Output) -> None:
    from rich.table import Table

    from flashcore.isolate.registry import all_planted

    every = all_planted()
    listed = Table(title="Bugs that --plant puts into a kernel", title_justify="left", box=None)
    for name in ("name", "kernel", "stage", "caught by", "what"):
        listed.add_column(name, overflow="fold")
    for planted in every:
        bug = planted.plant
        listed.add_row(bug.name, planted.kernel, planted.stage, bug.caught_by, bug.title)
    out.print(listed)
    out.finish(
        [
            to_json(planted.plant) | {"kernel": planted.kernel, "stage": planted.stage}
            for planted in every
        ]
    )


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
