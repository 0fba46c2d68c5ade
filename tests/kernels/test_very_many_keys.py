"""Test sums over more keys than one accumulator is exact over: the portable kernel's begin anew
every chunk (fwd_wmma/totals_wmma.cuh), and blocks of the Hopper kernel share the keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from plant_checks import check_text, undocumented
from torch import Tensor

from backends import GPU, WMMA
from flashcore import attention
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.checks.planned import under_gate, with_fields
from flashcore.kernels.fwd_sm90 import candidates as candidates_sm90
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
from flashcore.kernels.fwd_sm90.kernel import SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL
from flashcore.kernels.registry import PORTABLE
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.problem.exactness import KEYS_OF_CHUNK, MAX_KEYS_OF_A_SUM, MAX_KEYS_OF_A_SUM_SM90
from flashcore.selection.select import candidates
from flashcore.selection.space import tile_of, with_tile
from flashcore.sim import Plant, simulate
from flashcore.sim.plants.numerics import PLANTS_TOTALS

# Chunks of two or three key tiles; keys end in the middle of one.
CASES = {
    "full": {},
    "wide": {"head_dim": 256, "head_dim_v": 256},
    "causal": {"causal": "lower_right", "dtype": "bfloat16"},
    "window": {"window": (70, 9)},
    "mask": {"mask": "bool", "softcap": 5.0},
    "additive": {"mask": "additive", "causal": "upper_left"},
}
FEW = [("wide", 2), ("window", 2), ("mask", 2), ("causal", 3)]


def run(
    options: dict[str, Any], plant: Plant | None = None, chunk_tiles: int = 2, growth: float = 0.0
) -> bool:
    """Return whether the error rule holds. Scores grow by `growth` from key to key."""
    case = Case(**{"seqlen_q": 70, "seqlen_k": 333, "num_heads_q": 1, "num_heads_kv": 1} | options)
    x = make_inputs(case)
    q, k = x.q.clone(), x.k.clone()
    q[..., 0] = 1.0
    k[..., 0] = torch.arange(case.seqlen_k) * (growth * case.head_dim**0.5)
    problem = Problem.from_tensors(q, k, x.v, mask=x.mask, return_lse=True, **case.options())
    plan = candidates(problem, 80, kernel=KERNEL)[0]
    plan = dataclasses.replace(plan, keys_of_chunk=chunk_tiles * plan.block_n)
    out = torch.empty(*q.shape[:3], case.head_dim_v, dtype=q.dtype)
    lse = torch.empty(q.shape[:3])
    simulate(problem, plan, q, k, x.v, x.mask, out, lse, seed=1, plant=plant)
    return error_report(out, q, k, x.v, lse=lse, mask=x.mask, **case.options()).ok


@pytest.mark.parametrize("growth", [0.0, 0.2, -0.2])
@pytest.mark.parametrize(
    ("name", "chunk_tiles"),
    [
        pytest.param(*x, marks=() if x in FEW else pytest.mark.thorough)
        for x in (*((name, 2) for name in CASES), ("full", 3), ("causal", 3))
    ],
)
def test_chunks_add_up(name: str, chunk_tiles: int, growth: float) -> None:
    assert run(CASES[name], chunk_tiles=chunk_tiles, growth=growth)


@pytest.mark.parametrize("name", PLANTS_TOTALS)
def test_a_planted_bug_is_caught(name: str) -> None:
    assert not run({}, PLANTS_TOTALS[name], growth=0.2)


@pytest.mark.parametrize("name", PLANTS_TOTALS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS_TOTALS[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(PLANTS_TOTALS) == []


def test_chunks_keep_the_digits_that_one_sum_loses() -> None:
    """A model of the accumulators: steps of 16 keys that are cut off, chunks that are rounded."""
    steps = torch.full((1_200_000,), 11.3)  # of 19 million keys

    def cut_off_sum(x: Tensor) -> float:
        total = 0.0
        for step in x.tolist():
            total += step
            bits = torch.tensor(total, dtype=torch.float64)
            mantissa, exponent = torch.frexp(bits)
            total = float(torch.ldexp(torch.floor(mantissa * 2**24) / 2**24, exponent))
        return total

    # Of one chunk, and of what a chunk of that length would be in the end of one long sum.
    chunk = steps[: KEYS_OF_CHUNK // 16]
    exact = float(chunk.double().sum())
    assert abs(cut_off_sum(chunk) - exact) < 2**-13 * exact
    before = torch.tensor([float(steps.double().sum())])
    gained = cut_off_sum(torch.cat([before, chunk])) - float(before)
    assert abs(gained - exact) > 2**-8 * exact
    chunks = torch.full((steps.numel() * 16 // KEYS_OF_CHUNK,), exact)
    total = torch.zeros(())
    for one in chunks:
        total += one
    assert abs(float(total) - float(chunks.double().sum())) < 2**-13 * float(total)


def problem_of(seqlen_k: int, dtype: str = "float16", **options: Any) -> Problem:
    """Return a problem; tensors of that size are not needed."""
    x = torch.empty(1, 1, 64, 64, dtype=getattr(torch, dtype))
    problem = Problem.from_tensors(x, x, x, **options)
    strides = (seqlen_k * 64, seqlen_k * 64, 64)
    return dataclasses.replace(problem, seqlen_k=seqlen_k, k_strides=strides, v_strides=strides)


def test_only_very_many_keys_are_taken_in_chunks() -> None:
    for seqlen_k, chunk in ((MAX_KEYS_OF_A_SUM, 0), (MAX_KEYS_OF_A_SUM + 1, KEYS_OF_CHUNK)):
        plans = candidates(problem_of(seqlen_k), 80, kernel=KERNEL)
        assert {plan.keys_of_chunk for plan in plans if not plan.stream_k} == {chunk}
    narrow = dataclasses.replace(problem_of(2**20), window_left=100, window_right=0)
    assert candidates(narrow, 80, kernel=KERNEL)[0].keys_of_chunk == 0
    assert candidates(problem_of(2**20), 80, gate="tile", kernel=KERNEL)[0].keys_of_chunk == 0


def test_isolate_may_say_how_many_keys_a_sum_goes_over() -> None:
    problem = problem_of(4096)
    plan = with_fields(candidates(problem, 80, kernel=KERNEL)[0], {"keys_of_chunk": 128})
    assert plan.keys_of_chunk == 128
    assert under_gate(PORTABLE, {"keys_of_chunk": 128}) == {"keys_of_chunk": 0}
    with pytest.raises(ValueError, match="keys_of_chunk=128 is no field of a tile of attn_fwd_sm"):
        with_fields(candidates_sm90.candidates(problem)[0], {"keys_of_chunk": 128})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_blocks_of_the_hopper_kernel_share_very_many_keys(dtype: str) -> None:
    """However many row tiles there are, and whatever was measured for fewer keys."""
    most = MAX_KEYS_OF_A_SUM_SM90[dtype]
    problem = dataclasses.replace(problem_of(3 * most, dtype), num_heads_q=4096, num_heads_kv=4096)
    for plan in candidates_sm90.candidates(problem):
        assert isinstance(plan, plan_sm90.Sm90Plan)
        assert plan.num_splits >= 3
        assert with_tile(plan, tile_of(plan) | {"num_splits": 1}) is None
    (few, *_) = candidates_sm90.candidates(dataclasses.replace(problem, seqlen_k=4096))
    assert isinstance(few, plan_sm90.Sm90Plan)
    assert few.num_splits == 1


def test_where_the_hopper_kernel_cannot_split_the_portable_one_serves() -> None:
    most = MAX_KEYS_OF_A_SUM_SM90["float16"]
    assert SM90.obstacle(problem_of(3 * most)) is None
    many_rows = dataclasses.replace(
        problem_of(3 * most), num_heads_q=2**17, num_heads_kv=2**17, q_strides=(2**29, 2**12, 2**6)
    )
    assert "would take" in str(SM90.obstacle(many_rows))
    packed = dataclasses.replace(
        problem_of(3 * most), varlen="packed", total_q=64, total_k=3 * most
    )
    assert "cannot split those of packed sequences" in str(SM90.obstacle(packed))


@pytest.mark.parametrize("backend", [WMMA, GPU])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_keys", [MAX_KEYS_OF_A_SUM + 70, 18_900_000])
def test_terms_that_are_all_alike_on_a_gpu(num_keys: int, dtype: torch.dtype, backend: str) -> None:
    """All values are 1 but one, and all scores too small by the same for a weight of 1 but one."""
    q = torch.ones(1, 1, 3, 64, dtype=dtype, device="cuda")
    k = torch.full((1, 1, num_keys, 64), -0.07, dtype=dtype, device="cuda")
    k[:, :, num_keys // 2] = 0.0
    v = torch.full((1, 1, num_keys, 64), 0.7, dtype=dtype, device="cuda")
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    want = v[0, 0, 0, 0].double()
    assert (out.double() / want - 1).abs().max() <= torch.finfo(dtype).eps
    score = (q[0, 0, 0].double() * k[0, 0, 0].double()).sum() / 8
    want_lse = score + torch.log(num_keys - 1 + torch.exp(-score))
    assert (lse - want_lse).abs().max() < 1e-3
