"""Make calls of the kernel that appends to a cache, run it in the simulator, and hold it to what
PyTorch computes."""

from __future__ import annotations

import dataclasses
import math
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
FLOAT8 = torch.float8_e4m3fn
# Of memory that a simulated kernel has not written, by the size of elements.
POISON = {1: (torch.uint8, 0xA5), 2: (torch.int16, 0x7FA5)}
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
# Values that a conversion to 8 bits may get wrong: ends, ties, subnormals, both zeros, inf and NaN.
ODD = [
    448.0, -448.0, 449.0, 464.0, 465.0, 1e4, -1e4, math.inf, -math.inf, math.nan, -math.nan, 0.0,
    -0.0, 17.0, 19.0, 0.0068359375, 0.0009765625, -0.0029296875, 0.00097, 2.0**-10,
]  # fmt: skip
# Of 6 sequences and 2 heads; a scale of 0, and one whose quotients are all too large.
OF_BOTH = [[0.5, 3.0], [1.0, 0.01], [0.0, 1.0], [7.0, 0.3], [1.0, 1e-38], [2.0, 0.1]]

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
    "a part of halves turns": {
        "seqlen_q": 2,
        "page_size": 8,
        "head_dim": 48,
        "head_dim_v": 24,
        "rotary": 32,
    },
    "an odd number of heads": {"seqlen_q": 3, "rotary": 16, "num_heads_q": 3, "num_heads_kv": 1},
    "addresses between packets": {"seqlen_q": 3, "rotary": 16, "shifted": True},
    "packed, many sequences": {
        "seqlen_q": 2,
        "rotary": 16,
        "lengths": list(range(21)),
        "counts": [1, 1, 2, 0, 0, 1, 2, 1, 1, 0, 1, 1, 2, 1, 1, 1, 0, 1, 1, 2, 1],
    },
    "8 bits, a scale of all": {"seqlen_q": 3, "page_size": 8, "scales": (0.37, 1.0)},
    "8 bits, scales of heads": {
        "seqlen_q": 3,
        "heads_third": True,
        "head_dim": 40,
        "head_dim_v": 17,
        "rotary": 16,
        "scales": ([0.37, 0.02], [[5.0, 0.5]]),
    },
    "8 bits, scales of sequences and heads": {
        "seqlen_q": 4,
        "page_size": 8,
        "rotary": 16,
        "counts": [1, 4, 0, 3, 2, 2],
        "scales": (OF_BOTH, OF_BOTH[::-1]),
    },
    "8 bits, a prompt": {
        "seqlen_q": 20,
        "page_size": 1,
        "dtype": torch.bfloat16,
        "angles": torch.float32,
        "rotary": 10,
        "interleaved": True,
        "lengths": [0, 0, 3],
        "scales": ([[0.5], [1e30], [math.nan]], 0.1),
    },
    "8 bits, neighbours turn": {
        "seqlen_q": 2,
        "head_dim": 48,
        "head_dim_v": 40,
        "dtype": torch.bfloat16,
        "angles": torch.float32,
        "rotary": 32,
        "interleaved": True,
        "scales": (0.25, 2.0),
    },
    "8 bits, all values": {  # of which 60 divided by 7 are ties that a rounded 1 / 7 misses
        "seqlen_q": 32,
        "head_dim": 64,
        "dtype": torch.bfloat16,
        "lengths": [0] * 16,
        "scales": (7.0, 0.0123),
        "all_values": True,
    },
    "8 bits, wild scales": {
        "seqlen_q": 3,
        "scales": (
            [
                [math.inf, 3e38],
                [1e-30, 1e-29],
                [1e25, 2.0**60],
                [2.0**-60, 0.0],
                [-1.0, 1e-45],
                [1e-20, 1e19],
            ],
            [[1e20], [1e-18], [math.inf], [math.nan], [2.0**-61], [2.0**61]],
        ),
    },
    "8 bits, a wild table": {
        "seqlen_q": 2,
        "page_size": 8,
        "wild": True,
        "scales": (1.0, 1.0),
    },
}


@dataclasses.dataclass
class Call:
    """A call is the operator's arguments, and the kernel's."""

    arguments: tuple[Any, ...]
    plan: AppendPlan
    tensors: AppendTensors
    queries: str


def shifted(x: Tensor) -> Tensor:
    """Return a copy that begins an element behind a multiple of 16 bytes, its rows 16 apart."""
    room = x.new_empty((*x.shape[:-1], 2 * x.shape[-1]))
    assert room.data_ptr() % 16 == 0
    view = room[..., 1 : 1 + x.shape[-1]]
    return view.copy_(x)


def make_call(case: dict[str, Any]) -> Call:
    case = {"dtype": torch.float16, "interleaved": False, "queries": "end"} | case
    shape = {
        key: case[key]
        for key in (
            "seqlen_q", "seqlen_new", "page_size", "heads_third", "num_heads_q", "num_heads_kv",
            "head_dim", "head_dim_v",
        )
        if key in case
    }  # fmt: skip
    step = make_step(case.get("lengths", LENGTHS), dtype=case["dtype"], **shape)
    if case.get("wild"):
        assert step.table is not None
        step.table = [[99, -1, 2**31 - 1, -(2**31)]] * len(LENGTHS)
    assert step.new is not None
    q, new, ends = step.q, list(step.new), None
    scales: list[Tensor] = []
    if "scales" in case:
        step.caches = step.caches[0].to(FLOAT8), step.caches[1].to(FLOAT8)
        scales = [torch.tensor(scale, dtype=torch.float32) for scale in case["scales"]]
        for x in new:
            flat = x.view(-1)
            flat[: len(ODD)] = torch.tensor(ODD)
            if case.get("all_values"):
                flat.copy_(torch.arange(2**16).sub(2**15).to(torch.int16).view(x.dtype))
    if "counts" in case:
        ends = torch.tensor([0, *case["counts"]]).cumsum(0).to(INT32)
        rows = [
            torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(case["counts"])])
            for x in (q, *new)
        ]
        behind = (torch.cat([x, x[:3]]) for x in rows)  # three rows of no sequence
        q, *new = behind
    if case.get("shifted"):
        q, *new = (shifted(x) for x in (q, *new))
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
        offsets, positions, queries, "auto", *scales,
    )  # fmt: skip
    tensors = AppendTensors(
        None if cos is None else q, new[0], new[1], None if cos is None else torch.empty_like(q),
        k_cache.clone(), v_cache.clone(), cos, sin, lengths, torch.empty_like(lengths), table,
        ends, ends, offsets, positions, *(*scales, None, None)[:2],
    )  # fmt: skip
    dtype = NAMES[case["dtype"]]
    of_angles = dtype if cos is None else NAMES[cos.dtype]
    plan = AppendPlan(dtype, of_angles, case["interleaved"], "scales" in case)
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
        starts_early=call.plan.starts_early,
    )


def bits_of(x: Tensor) -> Tensor:
    """Return a tensor's bits as integers."""
    return x.contiguous().view(POISON[x.element_size()][0])


def assert_same(have: Tensor, want: Tensor) -> None:
    """Compare bit by bit; NaNs, whose sign depends on the machine, are all the same."""
    both = [x if x.element_size() > 1 else x.float() for x in (have, want)]
    is_nan = both[1].isnan()
    assert torch.equal(both[0].isnan(), is_nan)
    assert torch.equal(bits_of(have)[~is_nan], bits_of(want)[~is_nan])


def by_pytorch(call: Call) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return what PyTorch makes of a call, which leaves its caches as they were.

    Returns:
        rotated: the queries.
        lengths: of the sequences.
        caches: both; what was not written is unspecified.
        is_new: bool, which of their elements were written.
    """
    found = []
    for filling in (0x11, 0x22):
        caches = [torch.empty_like(x) for x in call.arguments[:2]]
        for x in caches:
            x.view(POISON[x.element_size()][0]).fill_(filling)
        rotated, lengths = serving._append(*caches, *call.arguments[2:])
        found.append(caches)
    is_new = [bits_of(a) == bits_of(b) for a, b in zip(*found, strict=True)]
    return rotated, lengths, found[0], is_new


def check(call: Call, plant: Plant | None = None, seed: int = 0) -> None:
    """Run both, and compare bit by bit: the caches where PyTorch writes, and nothing elsewhere."""
    simulate(call, plant, seed)
    rotated, lengths, caches, is_new = by_pytorch(call)
    assert torch.equal(call.tensors.lengths, lengths)
    if call.tensors.q_rotated is not None:
        assert_same(call.tensors.q_rotated, rotated)
    for i, x in enumerate((call.tensors.k_cache, call.tensors.v_cache)):
        assert_same(x[is_new[i]], caches[i][is_new[i]])
        assert bool((bits_of(x)[~is_new[i]] == POISON[x.element_size()][1]).all())
