"""Run the kernel that appends to a cache in the simulator, and compare it with PyTorch."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch
from cache_steps import make_step
from torch import Tensor

import flashcore.serving.append as serving
from flashcore.compile.codegen import KERNELS_DIR, generate_source
from flashcore.compile.plant import Plant
from flashcore.kernels.append import params
from flashcore.kernels.append.params import (
    AppendParams,
    AppendPlan,
    AppendTensors,
    append_grid_size,
    build_append_params,
)
from flashcore.sim.report import SimulationError
from flashcore.sim.run import simulate_source
from flashcore.sim.tensors import SimTensor

FILE = "append/append_kvcache.cuh"
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


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_does_what_pytorch_does(name: str) -> None:
    check(make_call(CASES[name]))


PLANTS = {
    plant.name: plant
    for plant in (
        Plant("no-room", "a token without room is written", FILE,
              "if (place >= int64_t(p.columns) * p.page_size) return;", ";", "out-of-bounds"),
        Plant("any-page", "a page is not checked", FILE,
              "if (page < 0 || page >= p.num_pages) return;", ";", "out-of-bounds"),
        Plant("negative-length", "a length is not clamped", FILE,
              "return clamped(gmem_load(p.seqlens_k + sequence), 0, p.columns * p.page_size);",
              "return gmem_load(p.seqlens_k + sequence);", "out-of-bounds", ("wrong-result",)),
        Plant("wild-position", "a position is not clamped", FILE,
              "return position < p.rotary_rows ? int(position) : p.rotary_rows - 1;",
              "return int(position);", "out-of-bounds"),
        Plant("no-sequence", "rows behind the last sequence are appended", FILE,
              "if (!at.is_any) return;", ";", "wrong-result", ("double-write", "unwritten-output")),
        Plant("late-end", "a sequence is found by its beginning", FILE,
              "if (end_of(cu_seqlens, middle + 1, rows) <= row) {",
              "if (end_of(cu_seqlens, middle + 1, rows) < row) {", "wrong-result",
              ("double-write",)),
        Plant("wrong-sign", "the angle has the other sign", FILE,
              "from_float<Element>(a * c - b * s)", "from_float<Element>(a * c + b * s)",
              "wrong-result"),
        Plant("neighbours", "pairs are neighbours", FILE,
              "const int first = INTERLEAVED ? 2 * i : i;", "const int first = 2 * i;",
              "wrong-result", ("double-write", "unwritten-output")),
        Plant("no-rest", "what does not turn is not moved", FILE,
              "for (int i = 2 * half + lane_idx(); i < dim; i += 32) {",
              "for (int i = dim + lane_idx(); i < dim; i += 32) {", "wrong-result",
              ("unwritten-output",)),
        Plant("values-of-keys", "values have the strides of keys", FILE,
              "const RowStrides& to = is_key ? p.k_cache_strides : p.v_cache_strides;",
              "const RowStrides& to = p.k_cache_strides;", "wrong-result",
              ("out-of-bounds", "double-write")),
        Plant("stale-length", "the new length does not count new tokens", FILE,
              "gmem_store(p.lengths + sequence, int(after < capacity ? after : capacity));",
              "gmem_store(p.lengths + sequence, tokens_before(p, sequence));", "wrong-result"),
        Plant("first-query", "queries stand at the first new token", FILE,
              "  if (p.queries == 0) {", "  if (p.queries == 3) {", "wrong-result"),
    )
}  # fmt: skip
SHOWN_BY = {
    "no-room": "one token, pages of 8",
    "any-page": "a wild table",
    "negative-length": "one token, pages of 8",
    "wild-position": "offsets",
    "no-sequence": "packed, rows of no sequence",
    "late-end": "packed",
    "wrong-sign": "halves turn",
    "neighbours": "halves turn",
    "no-rest": "one token, pages of 8",
    "values-of-keys": "contiguous, heads third",
    "stale-length": "one token, pages of 8",
    "first-query": "more new tokens than queries",
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    plant, case = PLANTS[name], CASES[SHOWN_BY[name]]
    kinds = {plant.caught_by, *plant.or_by}
    for seed in range(2):
        found = "nothing"
        try:
            check(make_call(case), plant, seed)
        except SimulationError as error:
            found = error.kind
        except AssertionError:
            found = "wrong-result"
        assert found in kinds


def test_the_arguments_mirror_says_what_the_kernel_s_struct_says() -> None:
    text = (KERNELS_DIR / FILE).read_text(encoding="utf-8")
    body = text.partition("struct AppendParams {")[2].partition("};")[0]
    lines = " ".join(line.split("//")[0] for line in body.splitlines())
    names = []
    for declaration in lines.split(";"):
        kind = declaration.replace("const Element", "").replace("const RotaryElement", "")
        kind = kind.replace("const int32_t", "").replace("<Element>", "").replace("<int32_t>", "")
        names += [word.split()[-1] for word in kind.split(",") if word.strip()]
    assert names == [name for name, *_ in AppendParams._fields_]
    assert f"APPEND_WARPS = {params.WARPS};" in text
    assert ctypes.sizeof(AppendParams) == 15 * 8 + 6 * 32 + 2 * 8 + 16 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_does_the_same_on_a_gpu(name: str) -> None:
    call = make_call(CASES[name])
    given = [x.cuda() if isinstance(x, Tensor) else x for x in call.arguments]
    rotated, lengths = serving._append_on_gpu(*given)
    want_rotated, want_lengths = serving._append(*call.arguments)
    assert torch.equal(lengths.cpu(), want_lengths)
    if call.tensors.q is not None:
        close(rotated.cpu(), want_rotated)
    for have, want in zip(given[:2], call.arguments[:2], strict=True):
        torch.testing.assert_close(have.cpu(), want, rtol=2.0**-7, atol=1e-6, equal_nan=True)
