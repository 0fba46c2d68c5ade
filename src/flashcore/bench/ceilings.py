"""Measure what the hardware gives at most, in the same run: a large matmul and a large copy."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.bench.timing import Timing, time_on_cpu, time_on_gpu


def measure(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Measure the ceilings.

    Args:
        device: "cuda" or "cpu".
        dtype: element type of the matrix product.

    Returns:
        matmul_flops (operations a second of an n x n x n product, also given as matmul_n) and
        copy_bytes (bytes a second, read plus written, of a copy far larger than the caches).
    """
    on_gpu = device == "cuda"
    size = 8192 if on_gpu else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    source = torch.ones(2**30 if on_gpu else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    clock = time_on_gpu if on_gpu else time_on_cpu
    # A kernel that reads and writes: it moves 4.26 TB/s on an H200, the driver's own copy (copy_)
    # 2.77 TB/s (2026-11-22, both timed by time_on_gpu on 4 GiB).
    timings = clock(
        {"matmul": lambda: a @ b, "copy": lambda: torch.add(source, 1.0, out=target)}, rounds=5
    )
    matmul, copy = timings["matmul"], timings["copy"]
    if not isinstance(matmul, Timing) or not isinstance(copy, Timing):
        raise RuntimeError(f"the ceilings could not be measured: {matmul}, {copy}")
    return {
        "matmul_n": float(size),
        "matmul_flops": 2.0 * size**3 / matmul.median,
        "copy_bytes": 2.0 * source.numel() * source.element_size() / copy.median,
    }


def figures(
    flops: float, num_bytes: float, timing: Timing, limits: dict[str, float]
) -> dict[str, Any]:
    """Return what a row of the results says of a timing: rates, the limit, the share of it.

    Args:
        flops: operations of a call.
        num_bytes: bytes that it reads and writes at least.
        timing: of the call.
        limits: what `measure` returns.
    """
    compute = flops / limits["matmul_flops"]
    memory = num_bytes / limits["copy_bytes"]
    limit = max(compute, memory)
    return {
        "seconds": timing.median,
        "rounds_seconds": list(timing.rounds),
        "eager_seconds": timing.eager,
        "flops": flops,
        "bytes": num_bytes,
        "flops_per_second": flops / timing.median,
        "bytes_per_second": num_bytes / timing.median,
        "limit_seconds": limit,
        "limited_by": "compute" if compute >= memory else "memory",
        "fraction_of_limit": limit / timing.median,
    }
