"""`flashcore build`: compile a bundle of kernels ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashcore.cli.options import parse_archs
from flashcore.cli.output import JsonFlag, command, si_bytes, usage_errors


def build(
    arch: Annotated[
        str, typer.Option("--arch", help="Architectures, comma-separated, such as sm_80,sm_90.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write.")] = Path(
        "flashcore.bundle"
    ),
    head_dim: Annotated[
        str | None,
        typer.Option("--head-dim", "-d", help="head_dims, comma-separated; default: the usual."),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Element types, comma-separated.")
    ] = "float16,bfloat16",
    json_output: JsonFlag = False,
) -> None:
    """Compile kernels into one file, for machines where nothing may be compiled.

    Needs NVRTC but no GPU. Where the bundle is used, the environment variable FLASHCORE_BUNDLE
    names the file; kernels found in it are not compiled. A bundle serves the flashcore version that
    wrote it: kernels are looked up by their source text.

    Examples:

        flashcore build --arch sm_90

        flashcore build --arch sm_80,sm_90 --head-dim 64,128 --output kernels.bundle
    """
    with command(json_output) as out:
        from flashcore.configurations import DTYPES, HEAD_DIMS, configurations
        from flashcore.jit import compile_plan, write_bundle

        dtypes = dtype.split(",")
        if unknown := [name for name in dtypes if name not in DTYPES]:
            raise typer.BadParameter(f"--dtype {unknown[0]} is not one of {', '.join(DTYPES)}")
        with usage_errors():
            dims = HEAD_DIMS if head_dim is None else tuple(int(d) for d in head_dim.split(","))
            wanted = configurations(archs=parse_archs(arch), head_dims=dims, dtypes=dtypes)
        if not output.parent.is_dir():
            raise typer.BadParameter(f"--output {output}: the folder {output.parent} is missing")
        plans = [entry.plan for entry in wanted]
        with out.progress(f"Compiling {len(plans)} kernels", len(plans)) as advance:
            for plan in plans:
                compile_plan(plan)
                advance()
            count = write_bundle(output, plans)
        size = output.stat().st_size
        out.print(f"wrote {output}: {count} kernels, {si_bytes(size)}", wrap=False)
        out.print(f"use it with: export FLASHCORE_BUNDLE={output.resolve()}", wrap=False)
        out.finish({"output": output, "kernels": count, "bytes": size, "plans": plans})
