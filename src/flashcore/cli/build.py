"""`flashcore build` compiles a bundle of kernels ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flashcore.cli.options import parse_archs
from flashcore.cli.output import JsonFlag, Output, command, seconds, si_bytes, usage_errors

_OF_CACHES = ("keys", "pages", "packed_pages")  # of the kinds of Problem.varlen
_LOG_LINES = 20  # of a run whose output goes to a file


def build(
    arch: Annotated[
        str, typer.Option("--arch", help="Architectures, comma-separated, such as sm_80,sm_90.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write.")] = Path(
        "flashcore.compile.bundle"
    ),
    head_dim: Annotated[
        str | None,
        typer.Option(
            "--head-dim",
            "-d",
            help="head_dims, comma-separated, 192/128 where v has another; default: the usual.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Element types, comma-separated.")
    ] = "float16,bfloat16",
    calls: Annotated[
        list[Path] | None,
        typer.Option("--calls", help="File of calls to add, as FLASHCORE_RECORD writes it."),
    ] = None,
    only_calls: Annotated[
        bool, typer.Option("--only-calls", help="Compile for the calls alone, not the usual.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Processes that compile; default: one a core."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Compile kernels into one file, for machines where nothing may be compiled.

    Needs NVRTC but no GPU. Where the bundle is used, the environment variable FLASHCORE_BUNDLE
    names the file; kernels found in it are not compiled. A bundle serves the flashcore version that
    wrote it: kernels are looked up by their source text. It holds what serving models usually asks
    for; FLASHCORE_RECORD=calls.json collects the calls of a run, and --calls adds them.

    Examples:

        flashcore build --arch sm_90

        flashcore build --arch sm_80,sm_90 --head-dim 64,128 --output kernels.bundle

        flashcore build --arch sm_90 --calls calls.json --only-calls
    """
    with command(json_output) as out:
        from flashcore.backends.recording import plans_of, read_calls
        from flashcore.base.machine import available_cores
        from flashcore.compile.compiler import nvrtc_version
        from flashcore.selection import building
        from flashcore.selection.configurations import (
            DTYPES,
            OTHER_HEAD_DIMS,
            SERVING_HEAD_DIMS,
            serving_plans,
        )

        archs, dtypes = parse_archs(arch), dtype.split(",")
        if unknown := [name for name in dtypes if name not in DTYPES]:
            raise typer.BadParameter(f"--dtype {unknown[0]} is not one of {', '.join(DTYPES)}")
        if only_calls and not calls:
            raise typer.BadParameter("--only-calls needs --calls, a file of calls")
        try:
            recorded = [call for file in calls or () for call in read_calls(file)]
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"--calls {error}") from error
        if not output.parent.is_dir():
            raise typer.BadParameter(f"--output {output}: the folder {output.parent} is missing")
        nvrtc_version()  # says what to install, before anything takes time
        dims = [*SERVING_HEAD_DIMS, *OTHER_HEAD_DIMS]
        if head_dim is not None:
            dims = [_dims(text) for text in head_dim.split(",")]
        plans = plans_of(recorded, archs)
        if not only_calls:
            with _counting(out, "Choosing kernels", len(dims)) as advance, usage_errors():
                for own in dims:
                    plans += serving_plans(archs, [own], dtypes, head_dim is not None)
                    advance()
        units = building.units(plans)
        # A process that attends to a cache appends to it, too.
        caches = {call.dtype for call, _ in recorded if call.varlen in _OF_CACHES}
        units |= building.append_units(archs, caches if only_calls else dtypes)
        workers = min(16, available_cores()) if jobs is None else jobs
        estimate = building.SECONDS_A_KERNEL * len(units) / workers
        what = f"Compiling {len(units)} kernels in {workers} processes, up to {seconds(estimate)}"
        with _counting(out, what, len(units)) as advance:
            count = building.write_bundle(output, units, workers, advance)
        size = output.stat().st_size
        out.print(f"wrote {output}: {count} kernels, {si_bytes(size)}", wrap=False)
        out.print(f"use it with: export FLASHCORE_BUNDLE={output.resolve()}", wrap=False)
        document = {"output": output, "kernels": count, "bytes": size, "calls": len(recorded)}
        out.finish({**document, "plans": plans})


def _dims(text: str) -> int | tuple[int, int]:
    """Return "192/128" as (192, 128), "64" as 64."""
    try:
        dims = [int(part) for part in text.split("/")]
    except ValueError:
        dims = []
    if len(dims) not in (1, 2):
        raise typer.BadParameter(f"--head-dim {text} is neither a number nor two such as 192/128")
    return dims[0] if len(dims) == 1 else (dims[0], dims[1])


@contextmanager
def _counting(out: Output, description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress on a terminal; in a log, lines that count, and say how long the rest may
    take."""
    started, done = time.monotonic(), 0
    every = max(1, -(-total // _LOG_LINES))
    with out.progress(description, total) as show:

        def advance() -> None:
            nonlocal done
            done += 1
            show()
            if not out.is_terminal and done % every == 0 and done < total:
                rest = (time.monotonic() - started) / done * (total - done)
                out.note(f"{done} of {total}, about {seconds(rest)} left")

        yield advance
