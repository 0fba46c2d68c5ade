"""Time packed queries of which most are few, on a Hopper GPU: decodes, and a mixed batch.

    python scripts/time_packed_decode.py [--page-sizes 16 256] [--unfolded] [--json FILE]

Each batch is timed as one packed call over pages and, where all sequences have one query, as a
padded call (stream-K, kernels/tile/stream_k.cuh). With `--unfolded` each head has a row tile of its
own, as before heads were folded (kernels/tile/folded_rows.cuh). Beside the times, in us, stand the
bytes of K and V that are there over 4.0 TB/s.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from flashcore.bench.document import head, write
from flashcore.bench.timing import time_on_gpu
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
from flashcore.ops.paged import attention_paged
from flashcore.ops.paged_varlen import attention_paged_varlen

# name -> queries and keys of each sequence, heads, heads of k and v, head_dim
Batch = tuple[list[int], list[int], int, int, int]
BATCHES: dict[str, Batch] = {
    "decodes": ([1] * 64, [4096] * 64, 32, 8, 128),
    "drafts": ([4] * 64, [4096] * 64, 32, 8, 128),
    "mixed": ([2048] + [1] * 63, [2048] + [4096] * 63, 32, 8, 128),
    "mixed-group-7": ([2048] + [1] * 63, [2048] + [4096] * 63, 28, 4, 128),
    "few-long": ([1] * 8, [32768] + [1024] * 7, 32, 8, 128),
    "one-of-128k": ([1] * 16, [131072] + [1024] * 15, 32, 8, 128),
    "mixed-short": ([512] + [1] * 63, [4096] * 64, 32, 8, 128),
    "mixed-late": ([2048] + [1] * 63, [8192] + [4096] * 63, 32, 8, 128),
    "mixed-long": ([8192] + [1] * 63, [8192] + [4096] * 63, 32, 8, 128),
    "parts-of-16": ([16] * 64, [4096] * 64, 32, 8, 128),
    "parts-of-32": ([32] * 64, [4096] * 64, 32, 8, 128),
    "parts-of-64": ([64] * 64, [4096] * 64, 32, 8, 128),
    "chunks": ([512] * 8, [4096] * 8, 32, 8, 128),
}


def make(batch: Batch, page_size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return packed q; pages of k and v, the page table, the lengths, and where queries end."""
    queries, keys, heads, heads_kv, dim = batch
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16, generator=generator)

    counts = [-(-n // page_size) for n in keys]
    table = torch.zeros(len(keys), max(counts), dtype=torch.int32, device="cuda")
    order = torch.randperm(sum(counts), device="cuda", generator=generator).int()
    for row, pages in zip(table, order.split(counts), strict=True):
        row[: len(pages)] = pages
    k, v = (normal(sum(counts), page_size, heads_kv, dim).transpose(1, 2) for _ in range(2))
    lengths = torch.tensor(keys, dtype=torch.int32, device="cuda")
    ends = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    return normal(sum(queries), heads, dim), [k, v, table, lengths, ends]


def calls_of(batch: Batch, page_size: int) -> dict[str, Callable[[], Any]]:
    """Return the calls to be timed, by name."""
    q, (k, v, table, lengths, ends) = make(batch, page_size)
    longest = max(batch[0])
    calls: dict[str, Callable[[], Any]] = {
        "packed": lambda: attention_paged_varlen(
            q, k, v, table, lengths, ends, longest, causal=True
        )
    }
    if longest == 1:
        calls["padded"] = lambda: attention_paged(q[:, :, None], k, v, table, lengths, causal=True)
    return calls


def main() -> None:
    """Time the batches that were asked for, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", nargs="*", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--page-sizes", nargs="*", type=int, default=[16, 256])
    parser.add_argument("--unfolded", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, help="where the result goes")
    given = parser.parse_args()
    if given.unfolded:
        setattr(plan_sm90, "heads_of_packed_rows", lambda problem: 0)  # noqa: B010
    found = []
    for name in given.batches:
        batch = BATCHES[name]
        _, keys, _, heads_kv, dim = batch
        for page_size in given.page_sizes:
            times = time_on_gpu(calls_of(batch, page_size))
            row: dict[str, Any] = {"batch": name, "page_size": page_size}
            row["bound_us"] = round(sum(keys) * heads_kv * dim * 4 / 4.0e6, 1)
            for which, t in times.items():
                row[f"{which}_us"] = t if isinstance(t, str) else round(t.median * 1e6, 1)
            found.append(row)
            print(row, flush=True)
    method = "bfloat16, medians of CUDA graph replays; bound: bytes of k and v at 4.0 TB/s"
    about = {"folded": not given.unfolded, "results": found}
    write(given.json, head("packed decode", "cuda", method) | about)


if __name__ == "__main__":
    main()
