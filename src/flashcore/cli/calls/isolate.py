"""Say which kernel `flashcore isolate` takes apart, where, and on which call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from flashcore.cli.output import Output
from flashcore.problem.case import Case

if TYPE_CHECKING:
    from flashcore.checks.paged_cases import PagedCase
    from flashcore.checks.varlen_cases import VarlenCase
    from flashcore.isolate.registry import Planted


def where(
    out: Output, backend: str, plant: str | None, arch: int | None, backward: bool
) -> tuple[str, str]:
    """Return the backend to run on, "sim" or a kernel's on the GPU, and the kernel; of the
    `backward` pass the one that a planted bug or a tile is of."""
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
    return backend, choosing.kernel_to_run(asked, plant, arch, backward)


class Chosen(NamedTuple):
    """Chosen is a call to take apart, the seed of its run, and further arguments of `isolate`."""

    case: Case | VarlenCase | PagedCase
    seed: int
    arguments: dict[str, Any]


def drawn(
    seed: int, index: int, backend: str, kernel: str, arch: int | None, is_on_gpu: bool
) -> Chosen:
    """Return a case of `verify`, with the arguments that it had there: of `verify --backward` for
    a kernel of the backward pass."""
    from flashcore.backends.dispatch import KERNELS
    from flashcore.base import env
    from flashcore.checks import drawing, gradient_drawing
    from flashcore.isolate.backward_calls import padded_case
    from flashcore.kernels.registry import BY_NAME

    case: Case | VarlenCase | PagedCase
    if BY_NAME[kernel].is_backward:
        found = gradient_drawing.draw_gradients(seed, index, backend if is_on_gpu else "sim")
        case = found.call
        if found.seqlens_k is not None:
            assert isinstance(case, Case)
            case = padded_case(case, found.seqlens_k)
        tiles = None if found.tiles is None else tuple(tile._asdict() for tile in found.tiles)
        return Chosen(case, case.seed, {"arrives": found.arrives, "tiles": tiles})
    if arch is None:
        arch = BY_NAME[kernel].only_arch or env.sim_arch()
    is_simulated = backend not in KERNELS
    one = drawing.draw(seed, index, *(("sim", arch) if is_simulated else (backend,)))
    return Chosen(one.case, one.case.seed, {"tile": dict(one.tile)})


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


def given_fields(ctx: typer.Context, planted: Planted) -> set[str]:
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
