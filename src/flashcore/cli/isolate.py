"""`flashcore isolate`: run the kernel stage by stage and name the first wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.cli import options as o
from flashcore.cli.output import JsonFlag, Output, command, seconds, table, to_json, usage_errors

if TYPE_CHECKING:
    from flashcore.gates import Isolation, StageResult

# What shows the most: several key tiles, tails everywhere, and several column chunks on Hopper.
_SEQLEN = {"attn_fwd_wmma": 150, "attn_fwd_sm90": 300}
_HEAD_DIM = {"attn_fwd_wmma": 64, "attn_fwd_sm90": 96}
_STATUS = {"ok": "[green]right[/]", "wrong": "[red]WRONG[/]", "alarm": "[red]ALARM[/]"}


def isolate(
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
    arch: Annotated[
        str | None, typer.Option("--arch", help="Simulate the kernel of this GPU, such as sm_90.")
    ] = None,
    seed: o.Seed = 0,
    json_output: JsonFlag = False,
) -> None:
    """Run the kernel stage by stage and name the first stage that is wrong.

    Every stage is compiled from the kernel's own source with a debug gate: Q@K^T, the online
    softmax, P@V (with P = 1/S every output row must be identical), one key tile, P@V in one warp
    (portable kernel only), and the whole kernel. Each result is compared with a float64 model. The
    first bad value is named with its tile, warp, lane and accumulator element, and a picture shows
    where errors sit. In the simulator races, deadlocks and bad accesses count as well. Exit status
    1 when a stage is wrong.

    Examples:

        flashcore isolate

        flashcore isolate --plant pv-atomic

        flashcore isolate --backend sm90 --plant early-release

        flashcore isolate --backend wmma --seqlen 1000 --head-dim 128 --causal
    """
    with command(json_output) as out:
        from flashcore import gates
        from flashcore.stages import Stage, stages_of

        if plant == "list":
            _list_plants(out)
        number = None if arch is None else o.parse_archs(arch)[0]
        with usage_errors():
            backend, kernel = _where(out, backend, plant, number)
        case = o.make_case(
            batch=batch,
            heads=heads,
            heads_kv=heads_kv,
            seqlen=_SEQLEN[kernel] if seqlen is None else seqlen,
            seqlen_k=seqlen_k,
            head_dim=_HEAD_DIM[kernel] if head_dim is None else head_dim,
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
        with out.progress(f"Isolating on {backend}", total=len(stages_of(kernel))) as advance:
            started = False

            def on_stage(stage: Stage) -> None:
                nonlocal started
                advance(1 if started else 0, f"gate {stage.name}: {stage.title}")
                started = True

            with usage_errors():
                found = gates.isolate(
                    case,
                    backend,
                    seed=seed,
                    plant=plant,
                    arch=number,
                    kernel=kernel,
                    on_stage=on_stage,
                )
        _show(out, found)
        out.finish({**_document(found), "ok": found.ok}, ok=found.ok)


def _where(out: Output, backend: str, plant: str | None, arch: int | None) -> tuple[str, str]:
    """The backend to run on, "sim" or a kernel's on the GPU, and the kernel."""
    import torch

    from flashcore import gates
    from flashcore.dispatch import KERNELS
    from flashcore.verify import GPU_BACKENDS, resolve_backend

    simulate = plant is not None or arch is not None or not torch.cuda.is_available()
    if backend == "auto":
        backend = "sim" if simulate else resolve_backend("auto")
    kernel = KERNELS.get(backend)
    if backend == "sm90" and not simulate:
        simulate = torch.cuda.get_device_capability() != (9, 0)
    if backend in GPU_BACKENDS and simulate:
        if plant is None and arch is None:
            out.note(f"No GPU that runs {kernel}: simulating it (`flashcore doctor` says more).")
        backend = "sim"
    gates.find_plant(plant, backend)  # raises for an unknown backend or plant
    return backend, kernel or gates.kernel_to_run(backend, plant, arch)


def _document(found: Isolation) -> dict[str, object]:
    document: dict[str, object] = to_json(found)
    return document


def _list_plants(out: Output) -> None:
    from flashcore.gates import kernels_of_plant
    from flashcore.sim import PLANTS, PLANTS_SM90

    plants = PLANTS | PLANTS_SM90
    rows = [
        [name, " ".join(kernels_of_plant(name)), plant.caught_by, plant.title]
        for name, plant in plants.items()
    ]
    title = "Bugs that --plant puts into a kernel"
    out.print(table(title, ["name", "kernel", "caught by", "what"], rows))
    out.finish(
        [to_json(plant) | {"kernels": kernels_of_plant(plant.name)} for plant in plants.values()]
    )


def _show(out: Output, found: Isolation) -> None:
    planted = f", planted bug: {found.plant}" if found.plant else ""
    where = f"{found.kernel} on {found.backend}"
    out.print(f"{found.case.describe()}, {where}, seed {found.seed}{planted}")
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
