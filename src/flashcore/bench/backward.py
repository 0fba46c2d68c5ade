"""Time the backward pass: which shapes, by which libraries, and how a library's passes are bound.

The bench times autograd's gradients of q, k and v, of an output that was computed before, by CUDA
graph replays as it times the forward (timing.py); and both passes together eagerly, with the host.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashcore.bench import ceilings, workloads
from flashcore.bench.checking import Gradients
from flashcore.bench.libraries import Library, cpu_libraries, gpu_libraries
from flashcore.bench.peers import find_backward_peers
from flashcore.bench.timing import (
    Passes,
    Timing,
    first_line,
    reason_of,
    time_passes_on_cpu,
    time_passes_on_gpu,
)
from flashcore.bench.workloads import Workload

# Five products where the forward has two.
FLOPS_OF_FORWARD = 2.5
HEAD_DIMS = (64, 96, 128, 192, 256)
SEQLENS = (1024, 4096, 16384)
_TOKENS, _HIDDEN = 16384, 2048
# Left out: what runs the same backward as another one, or stores all scores.
_NOT_TIMED = ("flashcore-wmma", "sdpa-math", "unfused")


def sweep(quick: bool = False) -> list[Workload]:
    """Return 16k tokens at hidden size 2048: head_dim 64 to 256, seqlen 1k to 16k, full and
    causal."""
    return [
        Workload(
            "sweep", _TOKENS // seqlen, _HIDDEN // head_dim, seqlen, head_dim, causal, "bfloat16"
        )
        for head_dim in ((64, 128) if quick else HEAD_DIMS)
        for causal in (False, True)
        for seqlen in (SEQLENS[:2] if quick else SEQLENS)
    ]


def gqa() -> list[Workload]:
    """Return 32 heads on 8, and as many heads of k and v, to compare with."""
    return [
        Workload("gqa", 4, 32, 4096, head_dim, True, "bfloat16", heads_kv)
        for head_dim in (64, 128)
        for heads_kv in (8, None)
    ]


def small() -> list[Workload]:
    """Return calls that do not fill a GPU, of which the host is a part."""
    return [
        Workload(
            "small", batch, heads, seqlen, head_dim, (number + head_dim // 64) % 2 == 0, "bfloat16"
        )
        for head_dim in (64, 128)
        for batch, heads in ((1, 8), (1, 32), (4, 16), (4, 32))
        for number, seqlen in enumerate((128, 256, 512, 1024))
    ]


def window() -> list[Workload]:
    """Return a sliding window over long sequences, and the same without it, to compare with."""
    return [dataclasses.replace(shape, compiles=False) for shape in workloads.window()]


def masked() -> list[Workload]:
    """Return shapes with mask tensors and soft-capping, and the same without."""
    return [
        Workload("masked", 4, 16, 2048, 128, False, "bfloat16"),
        Workload("masked", 4, 16, 2048, 128, False, "bfloat16", mask="bool"),
        Workload("masked", 4, 16, 2048, 128, False, "bfloat16", mask="additive"),
        Workload("masked", 4, 32, 2048, 64, False, "bfloat16"),
        Workload("masked", 4, 32, 2048, 64, False, "bfloat16", mask="bool"),
        Workload("masked", 4, 32, 2048, 64, False, "bfloat16", mask="additive"),
        Workload("masked", 4, 16, 2048, 128, True, "bfloat16", softcap=50.0),
    ]


GROUPS: dict[str, Callable[[], list[Workload]]] = {
    "sweep": sweep,
    "gqa": gqa,
    "small": small,
    "window": window,
    "masked": masked,
    "varlen": workloads.varlen,
}


def find_libraries(device: str) -> tuple[list[Library], list[dict[str, str]]]:
    """Return what computes gradients here, flashcore first; and {"library", "reason"} of the peers
    that cannot be imported."""
    if device == "cpu":
        return [library for library in cpu_libraries() if library.name not in _NOT_TIMED], []
    always = [library for library in gpu_libraries() if library.name not in _NOT_TIMED]
    peers, left_out = find_backward_peers()
    return always + peers, left_out


def num_bytes(workload: Workload) -> float:
    """Return the bytes of q, k, v, out, its gradient and lse, read once, of dq, dk and dv, written
    once, and of the mask tensor."""
    element = 4 if workload.dtype == "float32" else 2
    rows_q = workload.batch * workload.num_heads * workload.seqlen
    rows_k = workload.batch * workload.heads_kv * workload.keys
    of_forward = 2 * element * (rows_q + rows_k) * workload.head_dim  # and the mask, that it counts
    return workload.num_bytes + of_forward + 4.0 * rows_q


def bind(
    library: Library, workload: Workload, leaves: Sequence[Tensor], mask: Tensor | None,
    dout: Tensor,
) -> Passes:  # fmt: skip
    """Return a library's passes, of an output that is computed now.

    Args:
        library: whose forward autograd can differentiate, or one that binds itself.
        workload: what to compute.
        leaves: q, k and v, which require gradients.
        mask: the mask tensor, or None.
        dout: [batch, num_heads, seqlen, head_dim], gradient of the output.
    """
    if library.bind_passes is not None:
        return library.bind_passes(workload, leaves, dout)
    q, k, v = leaves
    call = library.prepare(workload, q, k, v, mask)
    out = call()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, dout)

    return Passes(backward, step, backward)


def run_workload(
    workload: Workload,
    libraries: Sequence[Library],
    device: str,
    rounds: int,
    limits: dict[str, float],
) -> list[dict[str, Any]]:
    """Return a row for each library: time, errors of the gradients, or why it did not run."""
    q, k, v = workload.tensors(device)
    mask = workload.mask_tensor(device)
    shape = (workload.batch, workload.seqlen, workload.num_heads, workload.head_dim)
    generator = torch.Generator(device=device).manual_seed(2)
    dout = torch.randn(shape, generator=generator, device=device).to(q.dtype).transpose(1, 2)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    stream = torch.cuda.Stream() if device == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    passes: dict[str, Passes] = {}
    outcomes: dict[str, Timing | str] = {}
    for library in libraries:
        reason = library.skip_reason(workload)
        if reason is None:
            with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(stream):
                warnings.simplefilter("always")
                try:
                    passes[library.name] = bind(library, workload, leaves, mask, dout)
                except Exception as error:  # of a peer, such as a version without a backward
                    reason = reason_of(error, caught)
        if reason is not None:
            outcomes[library.name] = reason
    if stream is not None:
        outcomes |= time_passes_on_gpu(passes, rounds, stream)
    else:
        outcomes |= time_passes_on_cpu(passes, rounds)
    expected = Gradients(workload, q, k, v, mask, dout)
    rows = []
    for library in libraries:
        outcome = outcomes[library.name]
        row = library.row(workload) | {"pass": "backward"}
        if isinstance(outcome, str):
            row["skipped"] = outcome
        else:
            try:
                with torch.cuda.stream(stream):
                    found = passes[library.name].gradients()
                if device == "cuda":
                    torch.cuda.synchronize()
                row |= expected.errors(found) | {"by_graph": outcome.by_graph}
                flops = FLOPS_OF_FORWARD * workload.flops
                row |= ceilings.figures(flops, num_bytes(workload), outcome, limits)
            except Exception as error:  # such as a result of another shape
                row["skipped"] = first_line(error)
        rows.append(row)
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows
