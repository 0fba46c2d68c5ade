"""Put the commands together. Every command is one module of this folder."""

from __future__ import annotations

from typing import Annotated

import typer

from flashcore import __version__
from flashcore.cli import (
    bench,
    bench_host,
    build,
    cache,
    demo,
    doctor,
    explain,
    isolate,
    resources,
    tune,
    verify,
)
from flashcore.cli.output import with_verbosity

_INTRO = """
Fused attention kernels for PyTorch, and the tools to check, debug and measure them.

Without a GPU everything but the timing of GPU kernels works: the same kernel source runs on the CPU
in a simulator that also looks for races, deadlocks and out-of-bounds accesses.
"""

_EXAMPLES = """
**First steps**

    flashcore demo             # attention on real input, checked and timed
    flashcore doctor           # what works here, what to do about the rest

**Check** against a float64 oracle

    flashcore verify                    # random shapes and options
    flashcore verify --backend sim      # the CUDA kernel itself, no GPU needed

**Debug a kernel**

    flashcore isolate                       # run it stage by stage
    flashcore isolate --plant pv-atomic     # see it find a planted bug

**Look inside, build ahead, measure**

    flashcore explain --seqlen 4096 --head-dim 128 --causal
    flashcore resources --head-dim 64
    flashcore build --arch sm_80,sm_90 --output kernels.bundle
    flashcore cache size
    flashcore bench --quick
    flashcore tune --seqlen 4096        # the fastest tiles on this GPU

Every command takes --json, -q and -v. `flashcore --install-completion`: completion in the shell.
Exit status: 0 fine, 1 a check failed, 2 wrong usage.
"""

app = typer.Typer(
    name="flashcore",
    help=_INTRO,
    epilog=_EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashcore {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    del version


for _name, _function in (
    ("demo", demo.demo),
    ("doctor", doctor.doctor),
    ("verify", verify.verify),
    ("isolate", isolate.isolate),
    ("resources", resources.resources),
    ("build", build.build),
    ("explain", explain.explain),
    ("bench", bench.bench),
    ("bench-host", bench_host.bench_host),
    ("tune", tune.tune),
):
    app.command(_name)(with_verbosity(_function))
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run the `flashcore` script, and `python -m flashcore`."""
    app(prog_name="flashcore")
