"""Run torch's context parallelism on flashcore: rings of GPUs, forward and backward.

    python scripts/bench_context_parallel.py --ranks 2 --json benchmarks/results/h200-rings-2.json
    python scripts/bench_context_parallel.py --ranks 2 --cpu --check  # a rehearsal, without a GPU

`torch.distributed.tensor.experimental.context_parallel` is not changed: it calls aten's flash
operators, which `flashcore.integrations.torch.activate()` serves. Every rank is a process with a
GPU of its own; the sequence is dealt out over them, and keys go round, by each of torch's two
rotations. First results of a short sequence are held to the error of one GPU; then tokens a second
are measured, beside torch's cuDNN and FlashAttention-2, and the share of ideal scaling: of the time
on one GPU with the same library, divided by the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import (
    context_parallel_unshard,
    set_rotate_method,
)
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore
import flashcore.integrations.torch as door
from flashcore.base import machine
from flashcore.bench.document import command_line
from flashcore.bench.timing import first_line

ROTATIONS = ("allgather", "alltoall")
LIBRARIES = ("flashcore", "cudnn", "fa2")
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
SEQ_DIM = 2
CHECKED_SEQLEN = 1024  # short enough for float64
FACTOR, ABSOLUTE = 2.0, 1e-5  # the rule of error, beside one GPU's error


@contextlib.contextmanager
def library_of(name: str, on_cpu: bool) -> Iterator[None]:
    """Have SDPA computed by a library."""
    if on_cpu:
        # SDPA takes other operators for CPU tensors, which rings do not know.
        original = F.scaled_dot_product_attention
        functional: Any = F
        functional.scaled_dot_product_attention = scaled_dot_product_attention
        try:
            with door.activate(backend="torch"):
                yield
        finally:
            functional.scaled_dot_product_attention = original
    elif name == "flashcore":
        with door.activate(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    else:
        with sdpa_kernel(KERNELS[name]):
            yield


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Return attention by the operator that SDPA takes on a GPU."""
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
    return result[0]


def inputs(seqlen: int, heads: int, head_dim: int, device: str) -> list[Tensor]:
    """Return q, k, v and dout, the same on every rank."""
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, heads, seqlen, head_dim
    dtype = torch.bfloat16
    return [
        torch.randn(shape, generator=generator, device=device).to(dtype)  # any device's numbers
        for _ in range(4)
    ]


def step(tensors: list[Tensor]) -> list[Tensor]:
    """Return out, dq, dk and dv of a causal call."""
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True)
    out.backward(dout)
    gradients = [x.grad for x in leaves if x.grad is not None]
    return [out.detach(), *gradients]


def in_a_ring(mesh: DeviceMesh, tensors: list[Tensor], rounds: int = 0) -> tuple[list[Tensor], Any]:
    """Return this rank's rows of out, dq, dk and dv put together again, and the milliseconds of
    each round."""
    times = []
    with context_parallel(mesh, buffers=tensors, buffer_seq_dims=[SEQ_DIM] * len(tensors)):
        results = step(tensors)
        for _ in range(rounds):
            times.append(milliseconds(tensors))
        whole = [] if rounds else context_parallel_unshard(mesh, results, [SEQ_DIM] * len(results))
    return whole, times


def milliseconds(tensors: list[Tensor]) -> float:
    """Return the time of a step on a GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if dist.get_world_size() > 1:
        dist.barrier()
    begin.record()
    step(tensors)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def largest_errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Return the largest error of each result."""
    return [float((x.double() - want).abs().max()) for x, want in zip(results, exact, strict=True)]


def check(mesh: DeviceMesh, rotation: str, options: argparse.Namespace) -> list[str]:
    """Return what is wrong with a ring's results: errors against float64 beside one GPU's."""
    device = "cpu" if options.cpu else "cuda"
    set_rotate_method(rotation)
    tensors = inputs(options.checked_seqlen, options.heads, options.head_dim, device)
    with library_of("flashcore", options.cpu):
        alone = step(tensors)
        ring, _ = in_a_ring(mesh, [x.clone() for x in tensors])
    q, k, v, dout = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flashcore.attention(*leaves, causal=True, backend="torch")
    exact = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    wrong = []
    errors = zip(largest_errors(ring, exact), largest_errors(alone, exact), strict=True)
    for name, (error, one) in zip(("out", "dq", "dk", "dv"), errors, strict=True):
        if not error <= FACTOR * one + ABSOLUTE:
            wrong.append(f"{rotation}: {name} is off by {error:.3g}, on one GPU by {one:.3g}")
    return wrong


def measure(mesh: DeviceMesh, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each length, library and rotation: its speed, or why it has none."""
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for seqlen in options.seqlens:
        for library in LIBRARIES:
            about = {"seqlen": seqlen, "library": library}
            if is_over(started, options.limit_s):
                rows.append(about | {"skipped": "the time was over"})
                continue
            try:
                rows += [about | row for row in measure_one(mesh, seqlen, library, options)]
            except (RuntimeError, NotImplementedError) as error:  # on all ranks alike
                rows.append(about | {"skipped": first_line(error)})
    return rows


def is_over(started: float, limit_s: float) -> bool:
    """Return whether the first rank's time is over: all ranks have to do the same."""
    over = torch.tensor(
        time.monotonic() - started > limit_s,
        dtype=torch.int32,
        device="cuda" if dist.get_backend() == "nccl" else "cpu",
    )
    dist.broadcast(over, 0)
    return bool(over)


def measure_one(
    mesh: DeviceMesh, seqlen: int, library: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each rotation."""
    rows = []
    ranks = dist.get_world_size()
    tensors = inputs(seqlen, options.heads, options.head_dim, "cuda")
    with library_of(library, on_cpu=False):
        step(tensors)
        one = statistics.median(milliseconds(tensors) for _ in range(options.rounds))
        for rotation in ROTATIONS:
            set_rotate_method(rotation)
            copies = [x.clone() for x in tensors]
            _, times = in_a_ring(mesh, copies, options.rounds)
            together = statistics.median(times)
            rows.append(
                {
                    "rotation": rotation,
                    "tokens_per_second": seqlen / together * 1e3,
                    "one_gpu_tokens_per_second": seqlen / one * 1e3,
                    "share_of_ideal": one / (ranks * together),
                }
            )
    return rows


def rank_main(rank: int, options: argparse.Namespace, port: int) -> None:
    """Do one rank's part. Raises SystemExit where a result is wrong."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if not options.cpu:
        torch.cuda.set_device(rank)
    backend = "gloo" if options.cpu else "nccl"
    dist.init_process_group(backend, rank=rank, world_size=options.ranks)
    try:
        mesh = init_device_mesh("cpu" if options.cpu else "cuda", (options.ranks,))
        wrong = [line for rotation in ROTATIONS for line in check(mesh, rotation, options)]
        if wrong:
            raise SystemExit("\n".join(wrong))
        if rank == 0:
            print(f"{options.ranks} ranks: right, by {' and '.join(ROTATIONS)}")
        if options.check:
            return
        rows = measure(mesh, options)
        if rank == 0:
            report(rows, options)
    finally:
        dist.destroy_process_group()


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the rows, and write them where --json says."""
    for row in rows:
        if "skipped" in row:
            print(f"S {row['seqlen']:>7} {row['library']:<9} has no time: {row['skipped']}")
            continue
        print(
            f"S {row['seqlen']:>7} {row['library']:<9} {row['rotation']:<9} "
            f"{row['tokens_per_second']:>12.0f} tokens/s {row['share_of_ideal']:6.2f} of ideal"
        )
    if options.json:
        head = {
            "kind": "rings",
            "date": machine.now(),
            "command": command_line(),
            "gpu": asdict(found) if (found := machine.gpu()) else None,
            "cpu": machine.cpu_name(),
            "versions": machine.versions(),
            "ranks": options.ranks,
            "heads": options.heads,
            "head_dim": options.head_dim,
            "dtype": "bfloat16",
            "causal": True,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Parse the command line and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes, each with a GPU")
    parser.add_argument("--cpu", action="store_true", help="without GPUs; only checks")
    parser.add_argument("--check", action="store_true", help="check results, measure nothing")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--checked-seqlen", type=int, default=CHECKED_SEQLEN)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=600, help="no new library after that")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.check |= options.cpu
    if not options.cpu and torch.cuda.device_count() < options.ranks:
        raise SystemExit(
            f"--ranks {options.ranks}, but {torch.cuda.device_count()} GPUs are here; "
            "--cpu rehearses without any"
        )
    spawn(rank_main, (options, free_port()), nprocs=options.ranks)


if __name__ == "__main__":
    main()
