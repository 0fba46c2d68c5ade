"""`flashcore verify` compares random cases with against the float64 oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.cli.options import Seed, parse_archs
from flashcore.cli.output import JsonFlag, command, usage_errors

if TYPE_CHECKING:
    from flashcore.checks.verify import CaseResult

    Verify = Callable[..., list[CaseResult]]


def verify(
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="auto (a GPU's best kernel, else torch), sm90, wmma, sim (CPU) or torch (CPU).",
        ),
    ] = "auto",
    seed: Seed = 0,
    cases: Annotated[
        int | None,
        typer.Option(
            "--cases",
            "-n",
            min=1,
            help="How many cases; default: 20, with sim two of each configuration (64 for sm_90, "
            "else 32; 32 with --backward).",
        ),
    ] = None,
    case: Annotated[
        int | None, typer.Option("--case", min=0, help="Replay only this case of the seed.")
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="The gradients of q, k and v instead of the output.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option("--arch", help="With sim: the kernel of this GPU, such as sm_90."),
    ] = None,
    plant: Annotated[
        str | None,
        typer.Option(
            "--plant", help="With sim: plant this bug; `isolate --plant list` names them."
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Check random shapes and options against a float64 oracle.

    Odd lengths, strided and offset tensors, GQA, windows, masks, softcap, rows that see no key, NaN
    behind the sequences' ends, scores that grow along the keys, packed sequences; in the simulator
    and on a GPU also the tiles, stages and schedules that ship. A case passes when its largest and
    its mean error are at most twice those of the same attention written plainly in the same dtype,
    plus 1e-5. A failing case prints the command that replays it, and the one that takes it apart.

    With --backward dq, dk and dv are checked, of dense calls, of padded batches with seqlens_k and
    of packed sequences, with gradients that arrive through out, lse or both; in the simulator the
    kernels for Hopper.

    Examples:

        flashcore verify --cases 100

        flashcore verify --backend sim --seed 7

        flashcore verify --backend sim --arch sm_90

        flashcore verify --backend sim --seed 7 --case 3

        flashcore verify --backend sim --arch sm_90 --plant sum-of-the-neighbour

        flashcore verify --backward --backend sim
    """
    with command(json_output) as out:
        from flashcore.checks import verify as verification

        with usage_errors():
            chosen = verification.resolve_backend(backend)
        number = None if arch is None else parse_archs(arch)[0]
        if number is not None and chosen != "sim":
            raise typer.BadParameter("--arch goes with --backend sim: a GPU's is its own")
        if chosen in verification.GPU_BACKENDS:
            _require_gpu(chosen)
        run = _backward(number, plant, chosen) if backward else _forward(number, plant, chosen)
        if cases is None:
            cases = 20 if chosen != "sim" else 2 * _configurations(number, backward)
        indices = range(cases) if case is None else [case]
        if chosen != backend and chosen == "torch":
            out.note("No GPU: verifying the PyTorch path. --backend sim runs the CUDA kernel.")
        with out.progress(f"Verifying {chosen}, seed {seed}", total=len(indices)) as advance:
            results = run(
                chosen,
                seed=seed,
                indices=indices,
                on_case=lambda result: advance(1, f"case {result.index} done"),
            )
        for result in results:
            if not result.ok or case is not None:
                state = "passed" if result.ok else "[red]FAILED[/]"
                out.print(f"case {result.index} {state}: {result.describe_call()}", wrap=False)
                out.print(f"  {result.describe()}".replace("[", "\\["), wrap=False)
            if not result.ok:
                out.print(f"  replay: {result.replay}", wrap=False)
                if result.isolate is not None:
                    out.print(f"  take apart: {result.isolate}", wrap=False)
        failed = sum(not result.ok for result in results)
        worst = max(
            (r for r in results if r.report is not None and r.report.max_limit > 0),
            key=lambda r: r.report.max_error / r.report.max_limit if r.report else 0.0,
            default=None,
        )
        if worst is not None and case is None:
            out.print(
                f"closest to its limit: case {worst.index}, {worst.describe_call()}: "
                f"{worst.describe()}".replace("[", "\\["),
                wrap=False,
            )
        if results and results[-1].does_not_compile:
            out.print("the kernel does not compile: no further case was run")
        out.print(f"{len(results) - failed} passed, {failed} failed")
        document = {
            "backend": chosen,
            "seed": seed,
            "passed": len(results) - failed,
            "failed": failed,
            "cases": results,
        }
        out.finish(document, ok=failed == 0)


def _forward(arch: int | None, plant: str | None, backend: str) -> Verify:
    """Return what verifies outputs, or refuse the plant."""
    from flashcore.checks import verify as verification

    with usage_errors():
        verification.find_plant(plant, backend, arch)
    return functools.partial(verification.verify, arch=arch, plant=plant)


def _backward(arch: int | None, plant: str | None, backend: str) -> Verify:
    """Return what verifies gradients, or refuse the plant or the architecture."""
    from flashcore.backends.obstacles import SM90_ARCH
    from flashcore.checks import verify_backward as verification

    if arch not in (None, SM90_ARCH):
        raise typer.BadParameter(
            f"--arch sm_{arch} has no backward kernels, sm_{SM90_ARCH} alone: leave it out"
        )
    with usage_errors():
        verification.find_backward_plant(plant, backend)
    return functools.partial(verification.verify_backward, plant=plant)


def _configurations(arch: int | None, backward: bool) -> int:
    from flashcore.base import env
    from flashcore.checks import drawing, gradient_drawing

    if backward:
        return gradient_drawing.num_configurations()
    return drawing.num_configurations(arch or env.sim_arch())


def _require_gpu(backend: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise typer.BadParameter(
            f"--backend {backend} needs a GPU and torch sees none (`flashcore doctor` says why); "
            "--backend sim runs a kernel on the CPU (with --arch sm_90 the Hopper kernel)"
        )
