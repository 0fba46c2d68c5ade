"""Compile, check and time tile variants of the backward kernels on a Hopper GPU.

    PYTHONPATH=src python scripts/time_backward.py [--dims 64 128] [--seqlens 1024 4096]
    PYTHONPATH=src python scripts/time_backward.py --any-order [--dims 64 96 128]

Variants run in a child process, which is killed and begun again behind a variant that hangs. With
--any-order no variants are timed, but whole backward passes by one kernel whose blocks add to dq in
the order of the keys, and those whose blocks add in any order (deterministic=False), in turns.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

TOKENS, HIDDEN = 16384, 2048
HANGS_AFTER_S = 25
DIMS_OF_ONE_KERNEL = (64, 96, 128)
TURNS = 7  # of timing, each of both orders

# (kernel, block_m, block_n, num_stages, other_stages, overlaps, early_dp, keeps_p)
VARIANTS = {
    64: [
        ("dq", 192, 64, 4, 3, True, True, True),
        ("dq", 192, 96, 3, 3, True, True, True),
        ("dq", 128, 128, 3, 2, True, True, True),
        ("dkdv", 128, 128, 3, 2, False, True, False),
        ("dkdv", 128, 128, 2, 2, False, False, False),
        ("dkdv", 96, 128, 3, 2, False, True, True),
        ("dkdv", 96, 128, 3, 2, True, False, False),
        ("dkdv", 64, 128, 4, 3, True, False, False),
    ],
    128: [
        ("dq", 128, 64, 3, 2, True, True, True),
        ("dq", 128, 80, 3, 2, True, True, True),
        ("dq", 128, 96, 3, 2, True, True, True),
        ("dkdv", 64, 128, 3, 2, True, False, False),
        ("dkdv", 64, 128, 4, 2, True, False, False),
        ("dkdv", 64, 128, 3, 3, True, False, False),
        ("dkdv", 64, 128, 3, 2, False, True, False),
    ],
    192: [
        ("dq", 128, 64, 3, 2, True, True, True),
        ("dkdv", 96, 64, 2, 2, True, True, True),
        ("dkdv", 80, 64, 3, 2, True, True, True),
        ("dkdv", 64, 64, 3, 3, True, True, True),
    ],
    256: [
        ("dq", 128, 64, 2, 1, False, True, True),
        ("dq", 128, 48, 3, 1, True, True, True),
        ("dkdv", 64, 64, 2, 2, True, True, True),
        ("dkdv", 48, 64, 3, 3, True, True, True),
    ],
}


def plan_of(dim: int, variant: tuple[Any, ...], causal: bool, dtype: str = "bfloat16") -> Any:
    """Return the plan of a variant."""
    from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL, make_plan
    from flashcore.kernels.bwd_sm90.tiles import BwdTile

    fields = {
        "dtype": dtype,
        "head_dim": dim,
        "head_dim_v": dim,
        "has_window_left": False,
        "has_window_right": causal,
        "has_softcap": False,
        "mask": None,
        "varlen": "none",
        "folds_heads": 0,
    }
    kernel = DQ_KERNEL if variant[0] == "dq" else DKDV_KERNEL
    return make_plan(kernel, BwdTile(*variant[1:]), fields)


def compile_variants(dims: list[int], part: int, parts: int) -> None:
    """Compile every `parts`-th variant into the cache."""
    from flashcore.compile.jit import resources

    todo = [(d, v, c) for d in dims for v in VARIANTS[d] for c in (False, True)]
    for dim, variant, causal in todo[part::parts]:
        try:
            r = resources(plan_of(dim, variant, causal))
            remarks = sorted({text.split(")")[0][-5:] for text in r.remarks})
            print(f"compiled D{dim} {variant} causal {causal}: spills {r.spill_bytes} {remarks}")
        except Exception as error:
            print(f"compile D{dim} {variant} causal {causal}: {error!r}"[:300])


def inputs(batch: int, heads: int, seqlen: int, dim: int) -> list[Any]:
    """Return q, k, v and dout, [batch, heads, seqlen, dim], as projections make them."""
    import torch

    torch.manual_seed(0)
    shape = batch, seqlen, heads, dim
    made = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return [x.transpose(1, 2) for x in made]


def time_us(function: Callable[[], object], repeats: int = 10) -> float:
    """Return microseconds of a call, the best of three runs of some."""
    import torch

    for _ in range(3):
        function()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / repeats)
    return min(times)


def flops(batch: int, heads: int, seqlen: int, dim: int, causal: bool) -> float:
    """Return the operations of the forward."""
    return 4 * batch * heads * seqlen * seqlen * dim * (0.5 if causal else 1.0)


def check(dim: int, variants: list[Any]) -> None:
    """Print a pair's errors against float64, relative to the largest value."""
    import torch

    import flashcore
    from flashcore.backends.backward_sm90 import fused_backward, run_on_gpu
    from flashcore.backends.tiled import attention_backward_tiled, attention_tiled
    from flashcore.kernels.bwd_sm90.plan import BwdPlans
    from flashcore.problem import Problem

    for causal in (False, True):
        for seqlen in (333, 1024):
            q, k, v, dout = inputs(1, 3, seqlen, dim)
            problem = Problem.from_tensors(q, k, v, causal=causal, return_lse=True)
            out, lse = flashcore.attention(q, k, v, causal=causal, return_lse=True)
            qe, ke, ve = (x.double() for x in (q, k, v))
            exact = Problem.from_tensors(qe, ke, ve, causal=causal, return_lse=True)
            oe, le = attention_tiled(exact, qe, ke, ve, None)
            given = dout.double(), None, False
            want = attention_backward_tiled(exact, qe, ke, ve, None, oe, le, *given)[:3]
            plans = BwdPlans(*(plan_of(dim, variant, causal) for variant in variants))
            first = fused_backward(problem, q, k, v, None, out, lse, dout, None, run_on_gpu, plans)
            again = fused_backward(problem, q, k, v, None, out, lse, dout, None, run_on_gpu, plans)
            errors = [
                float((a.double() - b).abs().max() / b.abs().max())
                for a, b in zip(first, want, strict=True)
            ]
            same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            verdict = "ok" if max(errors) < 0.01 and same else "WRONG"
            texts = " ".join(f"{e:.2e}" for e in errors)
            print(f"  check causal {causal} S{seqlen}: {texts} same {same} {verdict}", flush=True)


def run_variants(dim: int, seqlens: list[int], skip: int) -> None:
    """Check and time the variants of a head_dim from number `skip` on."""
    import torch

    import flashcore
    from flashcore.launch.backward_call import BackwardKernel
    from flashcore.problem import Problem

    signal.signal(signal.SIGALRM, lambda *_: os._exit(3))
    first = {kind: next(v for v in VARIANTS[dim] if v[0] == kind) for kind in ("dq", "dkdv")}
    for index, variant in enumerate(VARIANTS[dim]):
        if index < skip:
            continue
        print(f"AT {index}", flush=True)
        signal.alarm(HANGS_AFTER_S)
        try:
            print(f"D{dim} {variant}", flush=True)
            check(dim, [variant if v[0] == variant[0] else v for v in first.values()])
            for causal in (False, True):
                for seqlen in seqlens:
                    batch, heads = TOKENS // seqlen, HIDDEN // dim
                    q, k, v, dout = inputs(batch, heads, seqlen, dim)
                    problem = Problem.from_tensors(q, k, v, causal=causal, return_lse=True)
                    out, lse = flashcore.attention(q, k, v, causal=causal, return_lse=True)
                    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
                    for name in ("q", "k", "v"):
                        tensors["d" + name] = torch.empty_like(tensors[name])
                    tensors["delta"] = torch.zeros_like(lse)
                    kernel = BackwardKernel(
                        problem, plan_of(dim, variant, causal), tensors, q.device.index
                    )
                    addresses = tuple(x.data_ptr() for x in tensors.values())
                    us = time_us(functools.partial(kernel.launch, addresses))
                    products = 3 if variant[0] == "dq" else 4
                    rate = flops(batch, heads, seqlen, dim, causal) * products / 2 / us / 1e6
                    print(
                        f"  {'causal' if causal else 'full  '} S{seqlen:<6} {us:9.1f} us "
                        f"{rate:6.1f} TFLOP/s of its own products",
                        flush=True,
                    )
        except Exception as error:
            print(f"  FAILED {type(error).__name__}: {str(error)[:600]}", flush=True)
        signal.alarm(0)


def time_orders(dims: list[int], seqlens: list[int]) -> None:
    """Check and time passes with sums of dq in the order of the keys and in any, beside each
    other: delta, the kernel in the middle, and rounding, sums cleared where they have to be."""
    import statistics

    import torch

    import flashcore
    from flashcore.backends.backward_sm90 import fused_backward, run_on_gpu
    from flashcore.kernels.bwd_sm90.plan_one import (
        any_order_pays,
        in_any_order,
        select_one_kernel_plans,
    )
    from flashcore.problem import Problem

    print(f"{torch.cuda.get_device_name()}, bfloat16, {TOKENS} tokens, hidden {HIDDEN}")
    print("medians of one pass; the rule is what deterministic=False takes at this length")
    for dim in dims:
        for causal in (False, True):
            for seqlen in seqlens:
                batch, heads = TOKENS // seqlen, HIDDEN // dim
                q, k, v, dout = inputs(batch, heads, seqlen, dim)
                problem = Problem.from_tensors(q, k, v, causal=causal, return_lse=True)
                out, lse = flashcore.attention(q, k, v, causal=causal, return_lse=True)
                ordered = select_one_kernel_plans(problem)
                given = problem, q, k, v, None, out, lse, dout, None, run_on_gpu
                passes = [
                    functools.partial(fused_backward, *given, plans)
                    for plans in (ordered, in_any_order(ordered))
                ]
                errors = [
                    float((x.float() - y.float()).abs().max() / x.float().abs().max())
                    for x, y in zip(*(run() for run in passes), strict=True)
                ]
                times: list[list[float]] = [[], []]
                for _ in range(TURNS):
                    for taken, run in zip(times, passes, strict=True):
                        taken.append(time_us(run))
                in_order, in_any = (statistics.median(taken) for taken in times)
                work = flops(batch, heads, seqlen, dim, causal) * 2.5 / 1e6
                print(
                    f"D{dim:<4}{'causal' if causal else 'full  '} S{seqlen:<6} "
                    f"ordered {in_order:8.1f} us {work / in_order:6.1f} TFLOP/s   "
                    f"any order {in_any:8.1f} us {work / in_any:6.1f} TFLOP/s   "
                    f"ratio {in_order / in_any:5.3f}   "
                    f"rule {'any order' if any_order_pays(problem) else 'ordered'}   "
                    f"{'same' if max(errors) < 0.01 else 'WRONG'} to {max(errors):.1e}",
                    flush=True,
                )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dims", type=int, nargs="+")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument(
        "--any-order", action="store_true", help="time sums of dq in order and in any order"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.any_order:
        time_orders(arguments.dims or list(DIMS_OF_ONE_KERNEL), arguments.seqlens)
        return
    arguments.dims = arguments.dims or list(VARIANTS)
    if arguments.child:
        kind, *numbers = arguments.child
        if kind == "compile":
            compile_variants(arguments.dims, *map(int, numbers))
        else:
            run_variants(int(numbers[0]), arguments.seqlens, int(numbers[1]))
        return
    common = ["--seqlens", *map(str, arguments.seqlens), "--dims", *map(str, arguments.dims)]

    def child(*numbers: object, timeout: float = 600) -> tuple[str, int]:
        command = [sys.executable, __file__, *common, "--child", *map(str, numbers)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
        return done.stdout, done.returncode

    start = time.time()
    workers = max(1, (os.cpu_count() or 1) - 2)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for text, _ in pool.map(lambda part: child("compile", part, workers), range(workers)):
            print(text, end="", flush=True)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    for dim in arguments.dims:
        skip = 0
        while skip < len(VARIANTS[dim]):
            text, code = child("run", dim, skip)
            print(text, end="", flush=True)
            if code == 0:
                break
            at = [int(line.split()[1]) for line in text.splitlines() if line.startswith("AT ")]
            print(f"HUNG OR CRASHED with {code}", flush=True)
            skip = (at[-1] if at else skip) + 1
    print(f"done in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
