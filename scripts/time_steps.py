"""Time what surrounds attention in a step of a decoder, on a GPU: appending, and trees of drafts.

    python scripts/time_steps.py [--rooms 4096 32768] [--drafts 8 1] [--json FILE]

For each room of a sequence in the cache, in us: attention over what is there, of 16 bits and of 8;
a whole step, which appends new tokens with rotary embedding and attends to as many tokens; the
attention with a tree of drafts, as kernels read it, and as a mask over the whole room, as it was
before; the same queries packed, with and without the tree; and appending alone, by one kernel and
by PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import torch

import flashcore
from flashcore.bench.document import head, write
from flashcore.bench.timing import time_on_gpu
from flashcore.plain.trees import tree_over_keys
from flashcore.serving.append import append
from flashcore.serving.rotary import Rotary

BATCH, HEADS, HEADS_KV, DIM, PAGE_SIZE, DRAFTS = 64, 32, 8, 128, 64, 8
LENGTH = 2048  # tokens of each sequence, whatever the room


def calls_of(room: int, drafts: int = DRAFTS, device: str = "cuda") -> dict[str, Callable[[], Any]]:
    """Return the calls to be timed, by name; each sequence has `drafts` queries and new tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        x = torch.randn(*size, device=device, generator=generator)
        return x.bfloat16()

    columns, used = room // PAGE_SIZE, LENGTH // PAGE_SIZE
    table = torch.full((BATCH, columns), -1, dtype=torch.int32, device=device)
    order = torch.randperm(BATCH * used, device=device, generator=generator).int()
    table[:, :used] = order.view(BATCH, used)
    pages = [normal(BATCH * used, PAGE_SIZE, HEADS_KV, DIM).transpose(1, 2) for _ in range(2)]
    pages_8 = [x.float().div(0.01).clamp(-448, 448).to(torch.float8_e4m3fn) for x in pages]
    lengths = torch.full((BATCH,), LENGTH, dtype=torch.int32, device=device)
    q = normal(BATCH, HEADS, drafts, DIM)
    new = [normal(BATCH, HEADS_KV, drafts, DIM) for _ in range(2)]
    tree = torch.rand(drafts, drafts, device=device, generator=generator) < 0.6
    tree |= torch.eye(drafts, dtype=torch.bool, device=device)
    angle = torch.rand(room, DIM // 2, device=device, generator=generator)
    rotary = Rotary(angle.cos().bfloat16(), angle.sin().bfloat16(), False)
    scale = torch.full((HEADS_KV,), 0.01, device=device)
    before = lengths - drafts
    scales = {"k_scale": scale, "v_scale": scale}
    turned: dict[str, Any] = {
        "rotary_cos": rotary.cos,
        "rotary_sin": rotary.sin,
        "rotary_interleaved": rotary.interleaved,
    }

    def attend(to: list[torch.Tensor] = pages, queries: torch.Tensor = q, **more: Any) -> Any:
        asked: dict[str, Any] = {"seqlens_k": lengths, "page_table": table, "causal": False}
        return flashcore.attention_with_kvcache(queries, to[0], to[1], **(asked | more))

    packed: dict[str, Any] = {
        "queries": q.transpose(1, 2).reshape(BATCH * drafts, HEADS, DIM),
        "cu_seqlens_q": torch.arange(BATCH + 1, dtype=torch.int32, device=device) * drafts,
        "max_seqlen_q": drafts,
    }

    def step(to: list[torch.Tensor], **more: Any) -> Any:
        return attend(to, k_new=new[0], v_new=new[1], seqlens_k=before, **turned, **more)

    def appended(to: list[torch.Tensor], backend: str, **scales: Any) -> torch.Tensor:
        tensors = to[0], to[1], q, new[0], new[1], before, table, None, None
        return append(*tensors, rotary, backend, **scales)[0]

    return {
        "attention": attend,
        "step": lambda: step(pages),
        "attention 8 bits": lambda: attend(pages_8, **scales),
        "step 8 bits": lambda: step(pages_8, **scales),
        "with a tree": lambda: attend(tree_mask=tree),
        "with a mask of it": lambda: attend(mask=tree_over_keys(tree, None, q, lengths, room)),
        "packed": lambda: attend(**packed),
        "packed with a tree": lambda: attend(**packed, tree_mask=tree),
        "append": lambda: appended(pages, "auto"),
        "append by PyTorch": lambda: appended(pages, "torch"),
        "append 8 bits": lambda: appended(pages_8, "auto", **scales),
        "append 8 bits by PyTorch": lambda: appended(pages_8, "torch", **scales),
    }


def main() -> None:
    """Time the rooms that were asked for, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", nargs="*", type=int, default=[4096, 32768])
    parser.add_argument(
        "--drafts", nargs="*", type=int, default=[DRAFTS, 1], help="queries of each sequence"
    )
    parser.add_argument("--json", type=pathlib.Path, help="where the result goes")
    given = parser.parse_args()
    found = []
    for drafts, room in itertools.product(given.drafts, given.rooms):
        times = time_on_gpu(calls_of(room, drafts))
        us = {
            name: t if isinstance(t, str) else round(t.median * 1e6, 1) for name, t in times.items()
        }
        found.append({"drafts": drafts, "room": room, "us": us})
        print(found[-1], flush=True)
    method = (
        f"bfloat16, {BATCH} sequences of {LENGTH} tokens in pages of {PAGE_SIZE}, {HEADS} and "
        f"{HEADS_KV} heads of {DIM}; medians of CUDA graph replays"
    )
    write(given.json, head("steps", "cuda", method) | {"results": found})


if __name__ == "__main__":
    main()
