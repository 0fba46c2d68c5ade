"""`flashcore explain` says which kernel and tiles a call would use, and why."""

from __future__ import annotations

import io
from typing import Annotated

import typer

from flashcore.cli import options as o
from flashcore.cli.output import JsonFlag, command, usage_errors


def explain(
    batch: o.Batch = 1,
    heads: o.Heads = 8,
    heads_kv: o.HeadsKv = None,
    seqlen: o.Seqlen = 512,
    seqlen_k: o.SeqlenK = None,
    head_dim: o.HeadDim = 64,
    head_dim_v: o.HeadDimV = None,
    dtype: o.Dtype = "float16",
    causal: o.Causal = False,
    upper_left: o.UpperLeft = False,
    window: o.WindowOption = None,
    softcap: o.Softcap = None,
    scale: o.Scale = None,
    mask: o.Mask = "none",
    sinks: o.Sinks = False,
    layout: Annotated[
        str, typer.Option("--layout", help="Order in memory: bhsd or bshd (passed transposed).")
    ] = "bhsd",
    seqlens_k: Annotated[
        bool,
        typer.Option("--seqlens-k", help="The device alone knows how many keys each sequence has."),
    ] = False,
    packed: Annotated[
        str | None,
        typer.Option(
            "--packed",
            metavar="LENGTHS",
            help="Packed sequences of so many queries each, such as 512,300,17 or 8x512; as many "
            "keys, or --seqlen-k each.",
        ),
    ] = None,
    page_size: Annotated[
        int | None,
        typer.Option(
            "--page-size",
            min=1,
            help="A cache in pages of so many keys; --seqlen-k is the room of a sequence.",
        ),
    ] = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="The queries' tokens are new: a cache gets them first."),
    ] = False,
    cache_dtype: Annotated[
        str | None, typer.Option("--cache-dtype", help="float8_e4m3fn: a cache of 8 bits.")
    ] = None,
    batch_invariant: Annotated[
        bool,
        typer.Option("--batch-invariant", help="A sequence's bits depend on that sequence alone."),
    ] = False,
    backend: Annotated[
        str, typer.Option("--backend", help="auto, sm90, wmma, sim or torch.")
    ] = "auto",
    arch: Annotated[
        str | None, typer.Option("--arch", help="Plan for this GPU, such as sm_90.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Say which backend, kernel and tile configuration a call would use, and why.

    The same as flashcore.explain(q, k, v, ...) in Python, or with --packed explain_varlen, and with
    --page-size or --append explain_with_kvcache. Nothing is computed or compiled.

    Examples:

        flashcore explain --seqlen 4096 --head-dim 128 --causal

        flashcore explain --heads 32 --heads-kv 8 --arch sm_90 --layout bshd

        flashcore explain --packed 4x512,17 --heads 32 --heads-kv 8 --causal --arch sm_90

        flashcore explain --batch 8 --seqlen 1 --seqlen-k 4096 --page-size 64 --append --causal

        flashcore explain --packed 2048,7x1 --seqlen-k 8192 --page-size 64 --arch sm_90

        flashcore explain -b 8 -s 1 --seqlen-k 4096 --cache-dtype float8_e4m3fn --arch sm_90
    """
    with command(json_output) as out:
        from flashcore.cli.calls.explain import Asked, call_of, parse_lengths

        case = o.make_case(
            batch=batch,
            heads=heads,
            heads_kv=heads_kv,
            seqlen=seqlen,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            causal=causal,
            upper_left=upper_left,
            window=window,
            softcap=softcap,
            scale=scale,
            mask=mask,
            sinks=sinks,
            layout=layout,
        )
        with usage_errors():
            import torch

            on_gpu = torch.cuda.is_available() and backend != "sim"
            asked = Asked(
                lengths=parse_lengths(packed),
                seqlen_k=seqlen_k,
                seqlens_k=seqlens_k,
                page_size=page_size,
                append=append,
                cache_dtype=cache_dtype,
                device="cuda" if on_gpu else "cpu",
            )
            explain_call, tensors = call_of(case, asked)
            text = io.StringIO()
            explanation = explain_call(
                **tensors,
                batch_invariant=batch_invariant,
                backend=backend,
                arch=None if arch is None else o.parse_archs(arch)[0],
                file=text,
                **case.options(),
            )
        out.print(text.getvalue().rstrip().replace("[", "\\["), wrap=False)
        out.finish(explanation)
