"""Make calls of the kernel that appends to a cache, run it in the simulator, and hold it to what
PyTorch computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from cache_steps import make_step
from torch import Tensor

import flashcore.serving.append as serving
from flashcore.compile.codegen import generate_source
from flashcore.compile.plant import Plant
from flashcore.kernels.append.params import (
    AppendPlan,
    AppendTensors,
    append_grid_size,
    build_append_params,
)
from flashcore.sim.run import simulate_source
from flashcore.sim.tensors import SimTensor

INT32 = torch.int32
POISON = 0x7FA5  # of memory that a simulated kernel has not written
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

LENGTHS = [0, 11, 30, 32, -4, 2**31 - 1]
CASES: dict[str, dict[str, Any]] = {
    "one token, pages of 8": {"page_size": 8},
    "contiguous, heads third": {"seqlen_q": 3, "heads_third": True, "head_dim_v": 24},
    "pages of one": {"seqlen_q": 2, "page_size": 1},
    "halves turn": {"seqlen_q": 3, "page_size": 8, "rotary": 16},
    "a part of neighbours turns": {"seqlen_q": 2, "rotary": 10, "interleaved": True},
    "angles in float32": {"page_size": 8, "rotary": 16, "angles": torch.float32},
    "bfloat16": {"seqlen_q": 3, "rotary": 16, "dtype": torch.bfloat16},
    "more than a warp": {"seqlen_q": 2, "head_dim": 80, "rotary": 80},
    "packed": {"seqlen_q": 4, "page_size": 8, "rotary": 16, "counts": [1, 4, 0, 3, 2, 2]},
    "packed, rows of no sequence": {
        "seqlen_q": 4,
        "rotary": 16,
        "counts": [1, 3, 0, 0, 2, 2],
        "lengths": LENGTHS[::-1],
    },
    "more new tokens than queries": {"seqlen_q": 1, "seqlen_new": 4, "rotary": 16},
    "offsets": {"seqlen_q": 2, "rotary": 16, "offsets": [5, 60, -3, 7, 2**31 - 1, 0]},
    "positions": {"seqlen_q": 2, "rotary": 16, "positions": True},
    "queries begin": {"seqlen_q": 2, "seqlen_new": 5, "rotary": 16, "queries": "begin"},
    "queries are first": {"seqlen_q": 3, "rotary": 16, "queries": "first"},
    "a wild table": {"seqlen_q": 2, "page_size": 8, "wild": True},
}


@dataclasses.dataclass
class Call:
    """A call is the operator's arguments, and the kernel's."""

    arguments: tuple[Any, ...]
    plan: AppendPlan
    tensors: AppendTensors
    queries: str


def make_call(case: dict[str, Any]) -> Call:
    case = {"dtype": torch.float16, "interleaved": False, "queries": "end"} | case
    shape = {
        key: case[key]
        for key in ("seqlen_q", "seqlen_new", "page_size", "heads_third", "head_dim", "head_dim_v")
        if key in case
    }
    step = make_step(case.get("lengths", LENGTHS), dtype=case["dtype"], **shape)
    if case.get("wild"):
        assert step.table is not None
        step.table = [[99, -1, 2**31 - 1, -(2**31)]] * len(LENGTHS)
    assert step.new is not None
    q, new, ends = step.q, list(step.new), None
    if "counts" in case:
        ends = torch.tensor([0, *case["counts"]]).cumsum(0).to(INT32)
        rows = [
            torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(case["counts"])])
            for x in (q, *new)
        ]
        behind = (torch.cat([x, x[:3]]) for x in rows)  # three rows of no sequence
        q, *new = behind
    cos = sin = None
    if "rotary" in case:
        angle = torch.arange(40)[:, None] * 0.7 ** torch.arange(case["rotary"] // 2)
        angles = case.get("angles", case["dtype"])
        cos, sin = angle.cos().to(angles), angle.sin().to(angles)
    offsets = torch.tensor(case["offsets"], dtype=INT32) if "offsets" in case else None
    positions = None
    if case.get("positions"):
        positions = torch.arange(q.shape[0] * q.shape[2], dtype=INT32).view(q.shape[0], -1) * 5 - 3
    k_cache, v_cache = step.caches
    lengths, table, queries = step.seqlens_k, step.page_table, case["queries"]
    arguments = (
        k_cache, v_cache, q, *new, lengths, table, ends, ends, cos, sin, case["interleaved"],
        offsets, positions, queries, "auto",
    )  # fmt: skip
    tensors = AppendTensors(
        None if cos is None else q, new[0], new[1], None if cos is None else torch.empty_like(q),
        k_cache.clone(), v_cache.clone(), cos, sin, lengths, torch.empty_like(lengths), table,
        ends, ends, offsets, positions,
    )  # fmt: skip
    dtype = NAMES[case["dtype"]]
    plan = AppendPlan(dtype, dtype if cos is None else NAMES[cos.dtype], case["interleaved"])
    return Call(arguments, plan, tensors, queries)


def simulate(call: Call, plant: Plant | None = None, seed: int = 0) -> None:
    """Run the kernel in the simulator; what it does not write of the caches holds poison."""
    argument = build_append_params(call.tensors, call.queries)
    placed = []
    for name, x in call.tensors._asdict().items():
        if x is not None:
            is_cache = name.endswith("cache")
            written = is_cache or name in ("q_rotated", "lengths")
            placed.append(SimTensor(name, x, name, writable=written, complete=not is_cache))
    simulate_source(
        generate_source(call.plan, "host", plant),  # type: ignore[arg-type]
        argument,
        placed,
        grid=append_grid_size(argument),
        num_threads=call.plan.num_threads,
        smem_bytes=0,
        seed=seed,
    )


def close(have: Tensor, want: Tensor) -> None:
    bits = 10 if want.dtype == torch.float16 else 7
    torch.testing.assert_close(have, want, rtol=2.0**-bits, atol=1e-6)


def check(call: Call, plant: Plant | None = None, seed: int = 0) -> None:
    """Run both, and compare: the caches where PyTorch writes, and nothing elsewhere."""
    simulate(call, plant, seed)
    before = [x.view(torch.int16).clone() for x in call.arguments[:2]]
    rotated, lengths = serving._append(*call.arguments)
    assert torch.equal(call.tensors.lengths, lengths)
    if call.tensors.q_rotated is not None:
        close(call.tensors.q_rotated, rotated)
    caches = call.tensors.k_cache, call.tensors.v_cache
    for have, want, old in zip(caches, call.arguments[:2], before, strict=True):
        is_new = want.view(torch.int16) != old
        assert torch.equal(have.view(torch.int16) != POISON, is_new)
        close(have[is_new], want[is_new])
