"""`flashcore tune` searches the fastest tile configurations on this machine's GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashcore.cli import options as o
from flashcore.cli.output import JsonFlag, Output, command, seconds, table, usage_errors

if TYPE_CHECKING:
    from flashcore.bench.workloads import Workload
    from flashcore.tune.search import Found
    from flashcore.tune.session import Session

_NO_GPU = (
    "flashcore tune times kernels, and torch sees no GPU here; run it where the kernels will run "
    "(`flashcore doctor` says what works here, `flashcore resources` compiles without a GPU)"
)


def tune(
    groups: Annotated[
        str | None,
        typer.Option(
            "--groups",
            help="The benchmark's groups of shapes, varlen excluded; default: all but masked.",
        ),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option("--grid", help="The shapes of the table that ships, with few tiles each."),
    ] = False,
    backward: Annotated[
        bool,
        typer.Option(
            "--backward",
            help="The kernels of the gradients, for Hopper, each by itself; groups and grid are "
            "those of bench --backward.",
        ),
    ] = False,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", "-s", min=1, help="One shape instead: query length.")
    ] = None,
    seqlen_k: o.SeqlenK = None,
    batch: o.Batch = 1,
    heads: o.Heads = 16,
    heads_kv: o.HeadsKv = None,
    head_dim: o.HeadDim = 128,
    dtype: Annotated[str, typer.Option("--dtype", help="float16 or bfloat16.")] = "bfloat16",
    causal: o.Causal = False,
    window: o.WindowOption = None,
    softcap: o.Softcap = None,
    backend: Annotated[
        str, typer.Option("--backend", help="auto, sm90 or wmma: whose configurations.")
    ] = "auto",
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds until a configuration hangs.")
    ] = 30.0,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0, help="Start no search after this long.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write a table that can ship, and nothing into the cache."
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Search the fastest tile configurations on this GPU, and use them from then on.

    It lists what fits the GPU, compiles it in parallel, discards what spills or would deadlock,
    times the rest by CUDA graph replays, and checks the results of the fastest, in a child process
    that a hanging configuration cannot take down. A winner must be 2 % faster than what runs
    without. Winners go into the cache directory as tuned-sm_90.json (or the GPU's own architecture)
    after each shape, so Ctrl-C keeps what was found; they serve all problems of the same class
    (options and head_dim; lengths and heads to the nearest power of two) until the kernel's source
    changes. Set FLASHCORE_TUNED=0 to go by what ships with flashcore. --grid with --output measures
    what ships: in minutes, with a short list of tiles.

    --backward searches tiles of the kernel of dq, of the kernel of dk and dv, and of the one that
    computes all three, where it takes the shape; --grid is then the benchmark's sweep with a short
    list of tiles, and what is found goes into the cache as well.

    Examples:

        flashcore tune --seqlen 4096 --batch 4 --heads 32 --head-dim 64 --causal

        flashcore tune --groups small,gqa

        flashcore tune --grid --output tiles-sm_90.json

        flashcore tune --backward --seqlen 4096 --heads 32 --head-dim 64 --causal
    """
    with command(json_output) as out:
        from flashcore.backends.dispatch import KERNELS
        from flashcore.base import machine
        from flashcore.bench.document import command_line
        from flashcore.kernels.registry import BACKWARD

        with usage_errors():
            shape: Workload | None = None
            if (groups is not None) + (seqlen is not None) + grid > 1:
                raise ValueError("--groups, --seqlen and --grid exclude each other")
            if backward and output is not None:
                raise ValueError("--output writes the forward's table, which has no gradients")
            if backward and backend not in ("auto", *(kernel.backend for kernel in BACKWARD)):
                raise ValueError(f"--backend {backend} has no backward kernels: leave it out")
            if seqlen is not None:
                shape = _shape(
                    batch=batch,
                    heads=heads,
                    heads_kv=heads_kv,
                    seqlen=seqlen,
                    seqlen_k=seqlen_k,
                    head_dim=head_dim,
                    dtype=dtype,
                    causal=causal,
                    window=window,
                    softcap=softcap,
                )
            workloads = _workloads(groups, grid, backward) if shape is None else [shape]
            known = ("auto", *KERNELS)
            if backend not in known:
                raise ValueError(f"--backend {backend} is not one of {', '.join(known)}")
        session, complete = _search(
            out, workloads, backend, timeout, minutes, output, grid, backward
        )
        _show(out, session)
        gpu = machine.gpu()
        document = {
            "date": machine.now(),
            "command": command_line(),
            "gpu": None if gpu is None else asdict(gpu),
            "versions": machine.versions(),
            "geometric_mean_gain": _mean_gain(session.found),
            "failures": session.failures,
            "left_out": session.left_out,
            "compile_seconds": session.compile_seconds,
            "search_seconds": session.search_seconds,
            "results": [_row(entry) for entry in session.found],
        }
        out.finish(document, ok=complete and not session.failures)


def _shape(**options: Any) -> Workload:
    """Return the one shape that the options describe; `make_case` checks them."""
    from flashcore.bench.workloads import Workload

    if options["dtype"] not in ("float16", "bfloat16"):
        raise ValueError(f"--dtype {options['dtype']} is not float16 or bfloat16: no kernel")
    if options["batch"] < 1:
        raise ValueError("--batch 0: there is nothing to time")
    case = o.make_case(
        **options, head_dim_v=None, upper_left=False, scale=None, mask="none", seed=0
    )
    if options["heads_kv"] is not None and options["heads"] % options["heads_kv"]:
        raise ValueError(
            f"--heads {options['heads']} is not a multiple of --heads-kv {options['heads_kv']}"
        )
    return Workload(
        "custom",
        case.batch,
        case.num_heads_q,
        case.seqlen_q,
        case.head_dim,
        options["causal"],
        case.dtype,
        options["heads_kv"],
        options["seqlen_k"],
        case.window,
        case.softcap,
    )


def _workloads(groups: str | None, grid: bool, backward: bool) -> list[Workload]:
    from flashcore.bench import backward as bench_backward
    from flashcore.bench import workloads as bench_forward
    from flashcore.tune.grid import cells

    of_pass = bench_backward.GROUPS if backward else bench_forward.GROUPS
    if grid:
        return of_pass["sweep"]() if backward else cells()
    known = [name for name in of_pass if name != "varlen"]  # packed sequences go by the rules
    names = [name for name in known if name != "masked"]
    if groups is not None:
        names = [name.strip() for name in groups.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"--groups {name} is not one of {', '.join(known)}")
    return [workload for name in names for workload in of_pass[name]()]


def _search(
    out: Output,
    workloads: list[Workload],
    backend: str,
    timeout: float,
    minutes: float | None,
    output: Path | None,
    brief: bool,
    backward: bool,
) -> tuple[Session, bool]:
    """Search; return the session, and whether it came to its end."""
    from flashcore.errors import BackendUnavailableError
    from flashcore.selection import compiling, tuned
    from flashcore.tune import timing
    from flashcore.tune.keeping import CacheKeeper, Keeper, TableKeeper
    from flashcore.tune.session import Session, tasks_for

    gpu, arch = tuned.gpu_name(), tuned.gpu_arch()
    if gpu is None:
        raise BackendUnavailableError(_NO_GPU)
    keeper: Keeper = CacheKeeper(gpu, arch) if output is None else TableKeeper(output)
    # A table that ships is measured beside the rules, a user's beside the one that ships.
    shipped = output is None
    tasks = tasks_for(workloads, backend, arch, keeper, shipped=shipped, backward=backward)
    with (
        compiling.Compiler() as compile_plans,
        timing.GpuTimer(timeout) as timer,
        out.progress(f"Tuning {len(tasks)} shapes", total=len(tasks)) as advance,
    ):
        session = Session(tasks, keeper, compile_plans, timer, brief, minutes)
        complete = True
        try:
            session.run(advance)
        except KeyboardInterrupt:
            out.note("interrupted; what was found so far is kept")
            complete = False
    for failure in session.failures:
        out.error(failure)
    if session.left_out:
        out.note(f"{minutes:g} minutes were over; {session.left_out} shapes were left out")
    return session, complete


def _mean_gain(found: list[Found]) -> float | None:
    from flashcore.bench.reporting.summary import geometric_mean

    return geometric_mean([entry.gain for entry in found]) if found else None


def _row(found: Found) -> dict[str, Any]:
    from flashcore.selection.space import tile_of

    return {
        "workload": found.workload.name,
        "dtype": found.workload.dtype,
        "kernel": found.default.kernel,
        "default": tile_of(found.default),
        "default_seconds": found.default_seconds,
        "winner": tile_of(found.winner),
        "seconds": found.seconds,
        "timed": [{"tile": tile_of(plan), "seconds": time} for plan, time in found.ranking],
        "discarded": [{"tile": tile_of(plan), "reason": why} for plan, why in found.discarded],
    }


def _show(out: Output, session: Session) -> None:
    from collections import Counter

    from flashcore.kernels.registry import kernel_of

    found = sorted(session.found, key=_place) if session.brief else session.found
    rows = []
    for entry in found:
        won = entry.winner != entry.default
        kernel = kernel_of(entry.default)
        which = f", {kernel.title}" if kernel.is_backward else ""
        rows.append(
            [
                f"{entry.workload.name} {entry.workload.dtype}{which}",
                seconds(entry.default_seconds),
                seconds(entry.seconds) if won else "-",
                f"{entry.gain:.2f}x" if won else "-",
                f"{entry.timed}+{len(entry.discarded)}",
                _tile_text(entry),
            ]
        )
    columns = ["shape", "untuned", "tuned", "gain", "tried", "winner"]
    out.print(table("Fastest tiles (tried: timed+discarded)", columns, rows))
    reasons = Counter(why.partition(":")[0] for entry in found for _, why in entry.discarded)
    for reason, count in reasons.most_common():
        out.print(f"discarded {count}: {reason}".replace("[", "\\["), wrap=False)
    kinds: dict[str, list[Found]] = {}
    for entry in found:
        kind = f"D{entry.workload.head_dim} {'causal' if entry.workload.causal else 'full'}"
        kinds.setdefault(kind, []).append(entry)
    for kind, entries in kinds.items():
        changed = sum(entry.winner != entry.default for entry in entries)
        out.print(
            f"{kind}: {_mean_gain(entries):.3f}x, another tile on {changed} of {len(entries)}"
        )
    out.print(
        f"geometric mean gain of {len(found)} shapes: {_mean_gain(found) or 1.0:.3f}x; "
        f"{session.compile_seconds:.0f} s of compiling ahead, {session.search_seconds:.0f} s after"
    )


def _place(found: Found) -> tuple[int, bool, int, int]:
    workload = found.workload
    heads = workload.batch * workload.num_heads
    return workload.head_dim, workload.causal, workload.seqlen, heads


def _tile_text(found: Found) -> str:
    """Return the winner's rows x keys; the default has words in their place. Name what else
    differs."""
    from flashcore.selection.space import tile_of

    before, tile = tile_of(found.default), tile_of(found.winner)
    size = f"tile {tile['block_m']}x{tile['block_n']}"
    if found.winner == found.default:
        return size
    changed = [
        f"{name} {value}"
        for name, value in tile.items()
        if value != before[name] and name not in ("block_m", "block_n")
    ]
    return ", ".join([f"{size} for {before['block_m']}x{before['block_n']}", *changed])
