"""Check and time calls with a mask, and the gradient of an additive one, on a Hopper GPU.

    python scripts/time_masks.py [--cases learned-64 ...] [--once] [--json FILE]

Each case is timed beside the same call without a mask, and beside torch's SDPA with the same mask:
forward and backward together, and every kernel of flashcore's by itself. Gradients are held against
float64, of one head of one batch where the mask has its own, as an error beside the largest value.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
from flashcore.bench.document import head, write

# name -> batch, heads, heads of k and v, seqlen_q, seqlen_k, head_dim, the mask's dtype and shape
# (b, h, q, k: whole; 1: broadcast; +: columns of a wider one; None: no mask), whether its gradient
# is wanted, causal
Shape = tuple[int, int, int, int, int, int, torch.dtype | None, str, bool, bool]
BF16, F32, BOOL = torch.bfloat16, torch.float32, torch.bool
CASES: dict[str, Shape] = {
    "none-64": (8, 16, 16, 2048, 2048, 64, None, "", False, False),
    "bool-64": (8, 16, 16, 2048, 2048, 64, BOOL, "b1qk", False, False),
    "bool-row-64": (8, 16, 16, 2048, 2048, 64, BOOL, "b11k", False, False),
    "additive-64": (8, 16, 16, 2048, 2048, 64, BF16, "1hqk", False, False),
    "additive-f32-64": (8, 16, 16, 2048, 2048, 64, F32, "1hqk", False, False),
    "bool-odd-64": (8, 16, 16, 2048, 1999, 64, BOOL, "b1qk", False, False),
    "additive-odd-64": (8, 16, 16, 2048, 1999, 64, BF16, "1hqk", False, False),
    "additive-f32-odd-64": (8, 16, 16, 2048, 1999, 64, F32, "1hqk", False, False),
    "bool-sliced-64": (8, 16, 16, 2048, 2048, 64, BOOL, "b1qk+", False, False),
    "additive-sliced-64": (8, 16, 16, 2048, 2048, 64, BF16, "1hqk+", False, False),
    "learned-64": (8, 16, 16, 2048, 2048, 64, BF16, "1hqk", True, False),
    "learned-f32-64": (8, 16, 16, 2048, 2048, 64, F32, "1hqk", True, False),
    "learned-causal-64": (8, 16, 16, 2048, 2048, 64, BF16, "1hqk", True, True),
    "learned-one-64": (8, 16, 16, 1024, 1024, 64, BF16, "11qk", True, False),
    "learned-whole-64": (2, 16, 16, 2048, 2048, 64, BF16, "bhqk", True, False),
    "learned-keys-64": (8, 16, 16, 2048, 2048, 64, BF16, "b11k", True, False),
    "learned-rows-64": (8, 16, 16, 2048, 2048, 64, BF16, "1hq1", True, False),
    "learned-odd-64": (8, 16, 16, 1999, 1999, 64, BF16, "1hqk", True, False),
    "learned-gqa-128": (4, 32, 8, 2048, 2048, 128, BF16, "11qk", True, True),
    "none-128": (4, 16, 16, 4096, 4096, 128, None, "", False, False),
    "additive-f32-128": (4, 16, 16, 4096, 4096, 128, F32, "1hqk", False, False),
    "bool-128": (4, 16, 16, 4096, 4096, 128, BOOL, "b1qk", False, False),
    "additive-128": (4, 16, 16, 4096, 4096, 128, BF16, "1hqk", False, False),
    "learned-128": (4, 16, 16, 4096, 4096, 128, BF16, "1hqk", True, False),
    "learned-256": (4, 8, 8, 2048, 2048, 256, BF16, "1hqk", True, False),
}


METHOD = (
    "bfloat16; kernels: medians of 5 steps by torch's profiler; forward and backward: medians of 6 "
    "eager steps by events"
)


def described(shape: Shape) -> dict[str, Any]:
    """Return the fields of a row that say what was measured."""
    batch, heads, heads_kv, rows, keys, dim, dtype, dims, needs_grad, causal = shape
    of_heads = f"H{heads}" + f"/{heads_kv}" * (heads != heads_kv)
    mask = None
    if dtype is not None:
        names = {"b": "B", "h": "H", "q": "S", "k": "S", "1": "1"}
        sizes = ", ".join(names[d] for d in dims.rstrip("+"))
        mask = f"{str(dtype).removeprefix('torch.')} [{sizes}]" + " of a wider one" * ("+" in dims)
    lengths = f"S{rows}" + f"/{keys}" * (keys != rows)
    return {
        "shape": f"B{batch} {of_heads} {lengths} D{dim}" + " causal" * causal,
        "mask": mask,
        "needs_grad": needs_grad,
    }


def make(shape: Shape) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """Return leaves q, k and v, the mask, and what arrives at out."""
    batch, heads, heads_kv, rows, keys, dim, dtype, dims, needs_grad, _ = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=BF16, generator=generator)

    leaves = [
        normal(batch, heads, rows, dim), normal(batch, heads_kv, keys, dim),
        normal(batch, heads_kv, keys, dim),
    ]  # fmt: skip
    mask = None
    if dtype is not None:
        sizes = {"b": batch, "h": heads, "q": rows, "k": keys, "1": 1}
        *others, columns = (sizes[d] for d in dims.rstrip("+"))
        mask = normal(*others, columns + 8 * ("+" in dims))
        mask = mask > -1.0 if dtype == BOOL else mask.to(dtype)
        if "+" in dims:
            mask = mask[..., 3 : 3 + columns].detach()
        mask.requires_grad_(needs_grad)
    return [x.requires_grad_() for x in leaves], mask, normal(batch, heads, rows, dim)


def wrong_mask_gradient(shape: Shape, leaves: list[torch.Tensor], mask: torch.Tensor,
                        dout: torch.Tensor, found: torch.Tensor) -> float:  # fmt: skip
    """Return the largest error of the mask's gradient beside its largest value, of the first head
    and batch of the mask."""
    batch, heads, heads_kv, rows, keys, dim, _, dims, _, causal = shape
    want = torch.zeros(1, device="cuda", dtype=torch.float64)
    for b in range(1 if dims[0] == "b" else batch):
        for h in range(1 if dims[1] == "h" else heads):
            places = h, h * heads_kv // heads, h * heads_kv // heads
            heads_of = zip(leaves, places, strict=True)
            q, k, v = (x.detach()[b, place].double() for x, place in heads_of)
            s = q @ k.t() * dim**-0.5 + mask.detach()[0, 0].double()
            if causal:
                s = s.masked_fill(
                    torch.ones_like(s, dtype=torch.bool).triu(keys - rows + 1), -1e300
                )
            p = s.softmax(-1)
            dp = dout[b, h].double() @ v.t()
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            want = want + ds.sum_to_size(mask.shape[2:])
    error = (found[0, 0].double() - want).abs().max()
    return float(error / want.abs().max().clamp_min(1e-6))


def milliseconds(step: Callable[[], Any], repeats: int = 6) -> float:
    """Return the median of the times of a step."""
    for _ in range(2):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return sorted(times)[repeats // 2]


def kernel_times(step: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Return milliseconds by kernel of one step: the median launch, as often as a step has it."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type.name == "CUDA":
            times.setdefault(event.name[:40], []).append(event.device_time / 1e3)
    of_step = {name: statistics.median(x) * len(x) / repeats for name, x in times.items()}
    return {name: round(time, 4) for name, time in sorted(of_step.items(), key=lambda x: -x[1])}


def of_peer(backend: SDPBackend, shape: Shape, leaves: list[torch.Tensor],
            mask: torch.Tensor | None, dout: torch.Tensor) -> float | str:  # fmt: skip
    """Return milliseconds of torch's SDPA, or why there is none."""
    if mask is not None and mask.dtype == BF16 and mask.data_ptr() % 16:
        return "not run: reads a misaligned address"  # cuDNN, which ends the process's CUDA context
    wanted = [*leaves, *([mask] if mask is not None and mask.requires_grad else [])]
    batch, heads, heads_kv, rows, keys, *_ = shape

    def step() -> None:
        bias = mask
        if bias is not None:
            bias = bias if bias.dtype in (BF16, BOOL) else bias.to(BF16)
            if shape[-1]:
                hidden = torch.ones(rows, keys, device="cuda", dtype=torch.bool).triu(1)
                bias = bias.masked_fill(hidden, float("-inf"))
            bias = bias.expand(batch, heads, rows, keys)
        k, v = (x.repeat_interleave(heads // heads_kv, 1) for x in leaves[1:])
        out = F.scaled_dot_product_attention(leaves[0], k, v, attn_mask=bias)
        torch.autograd.grad(out, wanted, dout)

    try:
        with sdpa_kernel(backend):
            return round(milliseconds(step, 3), 4)
    except Exception as error:
        return str(error)[:80]


def run(name: str, once: bool) -> dict[str, Any]:
    """Return what was measured of a case."""
    shape = CASES[name]
    leaves, mask, dout = make(shape)
    wanted = [*leaves, *([mask] if mask is not None and mask.requires_grad else [])]

    def step() -> tuple[torch.Tensor, ...]:
        out = flashcore.attention(*leaves, mask=mask, causal=shape[-1])
        return torch.autograd.grad(out, wanted, dout)

    found = step()
    result: dict[str, Any] = {"case": name} | described(shape)
    if once:
        torch.cuda.synchronize()
        return result
    if mask is not None and mask.requires_grad:
        result["error"] = wrong_mask_gradient(shape, leaves, mask, dout, found[3])
        again = step()
        result["has_same_bits"] = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
        del again
    result["step_ms"] = round(milliseconds(step), 4)
    result["kernel_ms"] = kernel_times(step)
    result["efficient_ms"] = of_peer(SDPBackend.EFFICIENT_ATTENTION, shape, leaves, mask, dout)
    result["cudnn_ms"] = of_peer(SDPBackend.CUDNN_ATTENTION, shape, leaves, mask, dout)
    return result


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--once", action="store_true", help="compile, and time nothing")
    parser.add_argument("--json", type=pathlib.Path, help="where the result goes")
    arguments = parser.parse_args()
    document = head("masks", "cuda", METHOD) | {"results": []}
    results: list[dict[str, Any]] = document["results"]
    for name in arguments.cases:
        try:
            results.append(run(name, arguments.once))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:400]
            results.append({"case": name} | described(CASES[name]) | {"skipped": reason})
        torch.cuda.empty_cache()
        print(results[-1], flush=True)
        write(arguments.json, document)  # of what is done, should this one be ended


if __name__ == "__main__":
    main()
