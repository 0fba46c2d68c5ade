"""`flashcore explain` says which kernel and tiles a call would use, and why."""

from __future__ import annotations

import io
from typing import Annotated, Any

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
    backend: Annotated[
        str, typer.Option("--backend", help="auto, sm90, wmma, sim or torch.")
    ] = "auto",
    arch: Annotated[
        str | None, typer.Option("--arch", help="Plan for this GPU, such as sm_90.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Say which backend, kernel and tile configuration a call would use, and why.

    The same as flashcore.explain(q, k, v, ...) in Python. Nothing is computed or compiled.

    Examples:

        flashcore explain --seqlen 4096 --head-dim 128 --causal

        flashcore explain --heads 32 --heads-kv 8 --arch sm_90 --layout bshd
    """
    with command(json_output) as out:
        from flashcore import explain as explain_call

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
            q, k, v, mask_tensor, sinks_tensor = _empty_inputs(case, backend)
            number = None if arch is None else o.parse_archs(arch)[0]
            text = io.StringIO()
            explanation = explain_call(
                q,
                k,
                v,
                mask=mask_tensor,
                sinks=sinks_tensor,
                backend=backend,
                arch=number,
                file=text,
                **case.options(),
            )
        out.print(text.getvalue().rstrip().replace("[", "\\["), wrap=False)
        out.finish(explanation)


def _empty_inputs(case: Any, backend: str) -> tuple[Any, ...]:
    """Return tensors of the case's shapes that are never filled: explain reads no values."""
    import torch

    device = "cuda" if torch.cuda.is_available() and backend != "sim" else "cpu"

    def empty(heads: int, seqlen: int, dim: int) -> torch.Tensor:
        if case.layout == "bshd":
            shape = (case.batch, seqlen, heads, dim)
            return torch.empty(shape, dtype=case.torch_dtype, device=device).transpose(1, 2)
        if case.layout != "bhsd":
            raise ValueError(f"layout={case.layout!r} is not one of bhsd, bshd")
        shape = (case.batch, heads, seqlen, dim)
        return torch.empty(shape, dtype=case.torch_dtype, device=device)

    mask = None
    if case.mask != "none":
        rows = 1 if case.mask == "padding" else case.seqlen_q
        dtype = case.torch_dtype if case.mask == "additive" else torch.bool
        mask = torch.empty(1, 1, rows, case.seqlen_k, dtype=dtype, device=device)
    return (
        empty(case.num_heads_q, case.seqlen_q, case.head_dim),
        empty(case.num_heads_kv, case.seqlen_k, case.head_dim),
        empty(case.num_heads_kv, case.seqlen_k, case.head_dim_v),
        mask,
        torch.empty(case.num_heads_q, device=device) if case.sinks else None,
    )
