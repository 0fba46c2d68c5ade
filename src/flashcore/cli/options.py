"""Define the options that several commands share, and the Case that they describe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashcore.cli.output import usage_errors

Batch = Annotated[int, typer.Option("--batch", "-b", min=0, help="Batch size.")]
Heads = Annotated[int, typer.Option("--heads", min=1, help="Query heads.")]
HeadsKv = Annotated[
    int | None, typer.Option("--heads-kv", min=1, help="Key/value heads; default: as --heads.")
]
Seqlen = Annotated[int, typer.Option("--seqlen", "-s", min=0, help="Query length.")]
SeqlenK = Annotated[
    int | None, typer.Option("--seqlen-k", min=0, help="Key length; default: as --seqlen.")
]
HeadDim = Annotated[int, typer.Option("--head-dim", "-d", min=1, help="head_dim of q and k.")]
HeadDimV = Annotated[
    int | None, typer.Option("--head-dim-v", min=1, help="head_dim of v; default: as --head-dim.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="float16, bfloat16 (float32, float64: torch).")]
Causal = Annotated[
    bool, typer.Option("--causal", help="Lower-right aligned: the last query sees all keys.")
]
UpperLeft = Annotated[
    bool, typer.Option("--causal-upper-left", help="Causal as torch's is_causal aligns it.")
]
WindowOption = Annotated[
    str | None,
    typer.Option("--window", metavar="LEFT,RIGHT", help="Sliding window; -1: unbounded side."),
]
Softcap = Annotated[
    float | None, typer.Option("--softcap", help="Cap scores: softcap * tanh(score / softcap).")
]
Scale = Annotated[
    float | None, typer.Option("--scale", help="Factor of q.k; default 1/sqrt(head_dim).")
]
Mask = Annotated[str, typer.Option("--mask", help="none, bool, triangle, padding or additive.")]
Sinks = Annotated[
    bool, typer.Option("--sinks", help="A random logit of each head joins the softmax.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random numbers.")]
Arch = Annotated[
    str | None, typer.Option("--arch", help="GPU architecture, such as sm_90; default: all.")
]


def make_case(**options: Any) -> Any:
    """Return a flashcore.checks.cases.Case from the options above, with wrong values turned into
    usage errors."""
    from flashcore.checks.cases import CAUSAL_KINDS, MASK_KINDS
    from flashcore.problem.case import Case

    causal, upper_left = options.pop("causal"), options.pop("upper_left")
    if causal and upper_left:
        raise typer.BadParameter("--causal and --causal-upper-left exclude each other")
    kind = CAUSAL_KINDS[2] if causal else CAUSAL_KINDS[1] if upper_left else CAUSAL_KINDS[0]
    if options["mask"] not in MASK_KINDS:
        raise typer.BadParameter(f"--mask {options['mask']} is not one of {', '.join(MASK_KINDS)}")
    if options["dtype"] not in ("float16", "bfloat16", "float32", "float64"):
        raise typer.BadParameter(
            f"--dtype {options['dtype']} is not one of float16, bfloat16, float32, float64"
        )
    heads, seqlen, dim = options.pop("heads"), options.pop("seqlen"), options.pop("head_dim")
    heads_kv, seqlen_k = options.pop("heads_kv"), options.pop("seqlen_k")
    dim_v = options.pop("head_dim_v")
    with usage_errors():
        return Case(
            num_heads_q=heads,
            num_heads_kv=heads if heads_kv is None else heads_kv,
            seqlen_q=seqlen,
            seqlen_k=seqlen if seqlen_k is None else seqlen_k,
            head_dim=dim,
            head_dim_v=dim if dim_v is None else dim_v,
            causal=kind,
            window=parse_window(options.pop("window")),
            **options,
        )


def parse_window(text: str | None) -> tuple[int, int] | None:
    """Return "16,0" as (16, 0)."""
    if text is None:
        return None
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"--window {text} is not two integers LEFT,RIGHT such as 128,0 or -1,64"
        ) from error
    return left, right


def parse_archs(text: str | None) -> list[int]:
    """Return "sm_80,sm_90" as [80, 90]; None as every architecture that is held to a budget."""
    from flashcore.kernels.fwd_wmma.plan import SUPPORTED_ARCHS
    from flashcore.kernels.limits import KNOWN_ARCHS

    if text is None:
        return list(SUPPORTED_ARCHS)
    archs = []
    for part in text.split(","):
        digits = part.strip().removeprefix("sm_")
        if not digits.isdigit() or int(digits) not in KNOWN_ARCHS:
            known = ", ".join(f"sm_{arch}" for arch in KNOWN_ARCHS)
            raise typer.BadParameter(f"--arch {part.strip()} is not one of {known}")
        archs.append(int(digits))
    return archs
