"""`flashcore tune`: search the fastest tile configurations on this machine's GPU."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashcore.cli import options as o
from flashcore.cli.output import JsonFlag, Output, command, seconds, table, usage_errors

if TYPE_CHECKING:
    from flashcore.bench.workloads import Workload
    from flashcore.plan import Plan
    from flashcore.problem import Problem
    from flashcore.tune.search import Found

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
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write winners to this file, not into the cache."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Search the fastest tile configurations on this GPU, and use them from then on.

    Lists what fits the GPU, compiles it in parallel, discards what spills, would deadlock or gives
    wrong results, and times the rest by CUDA graph replays, in a child process that a hanging
    configuration cannot take down. A winner must beat the built-in table by 2 %. Winners go into
    the cache directory as tuned-sm_90.json (or the GPU's own architecture) after each shape, so
    Ctrl-C keeps what was found; they serve all problems of the same class (options and head_dim;
    lengths and heads to the nearest power of two) until the kernel's source changes. Set
    FLASHCORE_TUNED=0 to go by the built-in table.

    Examples:

        flashcore tune --seqlen 4096 --batch 4 --heads 32 --head-dim 64 --causal

        flashcore tune --groups small,gqa

        flashcore tune --backend wmma --groups seed
    """
    with command(json_output) as out:
        with usage_errors():
            shape: Workload | None = None
            if seqlen is not None:
                if groups is not None:
                    raise ValueError("--groups and --seqlen exclude each other")
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
            workloads = _workloads(groups) if shape is None else [shape]
            if backend not in ("auto", "sm90", "wmma"):
                raise ValueError(f"--backend {backend} is not one of auto, sm90, wmma")
        found, complete = _search(out, workloads, backend, timeout, output)
        _show(out, found)
        out.finish([_row(entry) for entry in found], ok=complete)


def _shape(**options: Any) -> Workload:
    """The one shape that the options describe; `make_case` checks them."""
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


def _workloads(groups: str | None) -> list[Workload]:
    from flashcore.bench.workloads import GROUPS

    known = [name for name in GROUPS if name != "varlen"]  # packed sequences go by the tables
    names = [name for name in known if name != "masked"]
    if groups is not None:
        names = [name.strip() for name in groups.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"--groups {name} is not one of {', '.join(known)}")
    return [workload for name in names for workload in GROUPS[name]()]


def _search(
    out: Output, workloads: list[Workload], backend: str, timeout: float, output: Path | None
) -> tuple[list[Found], bool]:
    """Searches and saves, shape by shape; whether all of it was done."""
    from flashcore import tuned
    from flashcore.errors import BackendUnavailableError
    from flashcore.tune import compiling, timing
    from flashcore.tune.search import DefaultFailedError, Search

    gpu, arch = tuned.gpu_name(), tuned.gpu_arch()
    if gpu is None:
        raise BackendUnavailableError(_NO_GPU)
    plans: dict[tuple[str, str], tuple[Workload, Plan]] = {}
    for workload in workloads:
        problem, default = default_plan(workload, backend, arch)
        # Of shapes of one class the first is timed: a second winner would take its place.
        plans.setdefault((default.kernel, tuned.problem_class(problem)), (workload, default))
    found: list[Found] = []
    complete = True
    with (
        compiling.Compiler() as compile_plans,
        timing.GpuTimer(timeout) as timer,
        out.progress("Tuning", total=len(plans)) as advance,
    ):
        try:
            for (_, problem_class), (workload, default) in plans.items():

                def on_step(what: str, done: int, total: int, name: str = workload.name) -> None:
                    advance(0, f"{name}: {what} {done}/{total}")

                try:
                    result = Search(workload, default, compile_plans, timer, on_step).run()
                except DefaultFailedError as error:
                    out.error(str(error))
                    complete = False
                else:
                    found.append(result)
                    save(result, gpu, problem_class, output or tuned.path_for(arch))
                advance(1)
        except KeyboardInterrupt:
            out.note("interrupted; what was found so far is kept")
            complete = False
    return found, complete


def default_plan(workload: Workload, backend: str, arch: int) -> tuple[Problem, Plan]:
    """The workload as a Problem on a GPU of an architecture, and what the tables say about it.

    Raises:
        BackendUnavailableError, NotImplementedError, TypeError: no kernel serves it there.
    """
    import torch

    from flashcore.dispatch import KERNELS, choose_backend
    from flashcore.errors import BackendUnavailableError
    from flashcore.plan import candidates
    from flashcore.problem import Problem

    def empty(seqlen: int, heads: int) -> torch.Tensor:
        shape = (workload.batch, seqlen, heads, workload.head_dim)
        return torch.empty(shape, dtype=getattr(torch, workload.dtype)).transpose(1, 2)

    k = empty(workload.keys, workload.heads_kv)
    described = Problem.from_tensors(
        empty(workload.seqlen, workload.num_heads),
        k,
        k,
        causal=workload.causal,
        window=workload.window,
        softcap=workload.softcap,
        mask=workload.mask_tensor("cpu"),
    )
    problem = dataclasses.replace(described, device="cuda", arch=arch)
    choice = choose_backend(problem, backend)
    if choice.backend not in KERNELS:
        raise BackendUnavailableError(f"{workload.name}: no kernel to tune: {choice.reason}")
    return problem, candidates(problem, kernel=KERNELS[choice.backend])[0]


def save(result: Found, gpu: str, problem_class: str, path: Path) -> None:
    """Keeps a winner in a file; where the table's own plan won, an earlier entry goes.

    Raises:
        FlashCoreError: the file cannot be written.
    """
    from flashcore import tuned
    from flashcore.errors import FlashCoreError
    from flashcore.tune.space import tile_of

    entry = tuned.Entry(
        gpu=gpu,
        kernel=result.winner.kernel,
        version=tuned.kernel_version(result.winner.kernel),
        problem_class=problem_class,
        tile=tile_of(result.winner),
        seconds=result.seconds,
        default_seconds=result.default_seconds,
        measured_on=f"{result.workload.name} {result.workload.dtype}",
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    try:
        if result.winner == result.default:
            tuned.save(path, [], dropped=[entry])
        else:
            tuned.save(path, [entry])
    except OSError as error:
        raise FlashCoreError(
            f"{path} cannot be written ({error}); set FLASHCORE_CACHE_DIR to a writable folder, or "
            "give another file with --output"
        ) from error


def _row(found: Found) -> dict[str, Any]:
    from flashcore.tune.space import tile_of

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


def _show(out: Output, found: list[Found]) -> None:
    from collections import Counter

    rows = []
    for entry in found:
        won = entry.winner != entry.default
        rows.append(
            [
                f"{entry.workload.name} {entry.workload.dtype}",
                seconds(entry.default_seconds),
                seconds(entry.seconds) if won else "-",
                f"{entry.default_seconds / entry.seconds:.2f}x" if won else "-",
                f"{entry.timed}+{len(entry.discarded)}",
                _tile_text(entry.winner),
            ]
        )
    columns = ["shape", "table", "tuned", "gain", "tried", "tile"]
    out.print(table("Fastest tiles (tried: timed+discarded)", columns, rows))
    reasons = Counter(why.partition(":")[0] for entry in found for _, why in entry.discarded)
    for reason, count in reasons.most_common():
        out.print(f"discarded {count}: {reason}".replace("[", "\\["), wrap=False)


def _tile_text(plan: Plan) -> str:
    """Sizes, then what is switched on or not 1."""
    from flashcore.tune.space import tile_of

    tile = tile_of(plan)
    words = [f"rows x keys {tile.pop('block_m')}x{tile.pop('block_n')}"]
    for name, value in tile.items():
        if value is True:
            words.append(name)
        elif value is not False and not (
            name in ("min_blocks", "key_splits", "tail_rounds", "num_splits") and value == 1
        ):
            words.append(f"{name} {value}")
    return ", ".join(words)
