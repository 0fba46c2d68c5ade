"""Time whole backward passes through autograd: flashcore beside torch's cuDNN and FlashAttention-2.

    python scripts/bench_backward.py --json benchmarks/results/h200-backward.json

16k tokens, hidden size 2048, bfloat16; libraries take turns, and the median of the rounds counts.
Operations are 2.5 times the forward's, as is usual. Needs a GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
from flashcore.base import machine

TOKENS, HIDDEN = 16384, 2048
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def forward(library: str, tensors: list[torch.Tensor], causal: bool) -> torch.Tensor:
    """Return the output of a library's attention, recorded."""
    q, k, v = tensors
    if library == "flashcore":
        return flashcore.attention(q, k, v, causal=causal)
    with sdpa_kernel(BACKENDS[library]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def microseconds(function: Callable[[], object], calls: int) -> float:
    """Return the time of a call on the GPU, its launches included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls


def measure(head_dim: int, seqlen: int, causal: bool, rounds: int) -> dict[str, Any]:
    """Return TFLOP/s by library, and the largest difference of our gradients from cuDNN's."""
    heads, batch = HIDDEN // head_dim, TOKENS // seqlen
    shape = batch, heads, seqlen, head_dim
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    flops = 2.5 * 4 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1)
    steps: dict[str, Callable[[], Any]] = {}
    for library in ("flashcore", *BACKENDS):
        out = forward(library, leaves, causal)
        steps[library] = functools.partial(
            torch.autograd.grad, out, leaves, dout, retain_graph=True
        )
    results = {library: step() for library, step in steps.items()}
    pairs = zip(results["flashcore"], results["cudnn"], strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    times: dict[str, list[float]] = {library: [] for library in steps}
    order = list(steps)
    for number in range(rounds):
        for library in order[number % len(order) :] + order[: number % len(order)]:
            times[library].append(microseconds(steps[library], 3))
    rates = {name: flops / statistics.median(own) / 1e6 for name, own in times.items()}
    return {
        "head_dim": head_dim,
        "seqlen": seqlen,
        "causal": causal,
        "tflops_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "largest_difference_from_cudnn": difference,
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--seqlens", type=int, nargs="+", default=[1024, 4096, 16384])
    arguments = parser.parse_args()
    rows = []
    for cell in itertools.product(arguments.dims, arguments.seqlens, (False, True)):
        rows.append(measure(*cell, arguments.rounds))
        head_dim, seqlen, causal = cell
        rates = rows[-1]["tflops_per_second"]
        line = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        print(f"D{head_dim} S{seqlen} {'causal' if causal else 'full'}: {line}", flush=True)
    if arguments.json is not None:
        document = {
            "date": date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "versions": machine.versions(),
            "method": f"eager calls, median of {arguments.rounds} rounds of 3 calls, bfloat16",
            "results": rows,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
