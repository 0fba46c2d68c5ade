"""Test packed sequences whose keys the device cuts into ranges in the portable kernel, where the
heads of a group are rows of one row tile; see test_packed_pieces.py for the Hopper kernel."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from packed_pieces import CASE, CASES, COUNTS, LENGTHS, problem_of
from pages import check_packed, packed_over_pages
from parameters import thorough_but

import flashcore
from backends import SIM, WMMA, device_of
from flashcore.backends.packed import packed_problem
from flashcore.checks.planned import with_fields
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs, varlen_error_report
from flashcore.kernels import stream_k
from flashcore.kernels.fwd_wmma import tiles
from flashcore.kernels.fwd_wmma.plan import KERNEL, SIM_ARCH, Plan
from flashcore.kernels.registry import PORTABLE
from flashcore.problem import Problem
from flashcore.problem.exactness import MAX_KEYS_OF_A_SUM
from flashcore.problem.memory_layout import as_batch
from flashcore.selection.select import candidates
from flashcore.sim import simulate

both_devices = pytest.mark.parametrize("backend", [SIM, WMMA])


@pytest.fixture
def cut_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device cut calls that the simulator has time for."""
    monkeypatch.setattr(tiles, "_CUT_BYTES", 2**10)


def plan_of(problem: Problem, arch: int = SIM_ARCH) -> Plan:
    return candidates(problem, arch, kernel=KERNEL)[0]


@pytest.mark.usefixtures("cut_small_calls")
@pytest.mark.parametrize("case", thorough_but((CASE,), CASES), ids=VarlenCase.describe)
@both_devices
def test_every_sequence_is_as_if_alone(backend: str, case: VarlenCase) -> None:
    plan, group = plan_of(problem_of(case)), case.num_heads_q // case.num_heads_kv
    assert plan.stream_k
    assert plan.folds_heads == (group if group > 1 else 0)
    x = make_varlen_inputs(case, device_of(backend))
    results = [
        flashcore.attention_varlen(
            *x.arguments(), return_lse=True, backend=backend, sinks=x.sinks, **case.options()
        )
        for _ in range(2)
    ]
    (out, lse), again = results
    report = varlen_error_report(out, lse, case, x)
    assert report is not None
    assert report.ok, f"{case.describe()}: {report}"
    assert torch.equal(out[: sum(case.lengths_q)], again[0][: sum(case.lengths_q)])


@pytest.mark.usefixtures("cut_small_calls")
@pytest.mark.parametrize("cache_dtype", thorough_but(("float8_e4m3fn",), ("", "float8_e4m3fn")))
@both_devices
def test_caches_in_pages(backend: str, cache_dtype: str) -> None:
    cache, q, (out, lse, most) = packed_over_pages(
        backend, COUNTS, LENGTHS, cache_dtype=cache_dtype, return_max_score=True
    )
    check_packed(cache, COUNTS, q, out, lse, causal=True)
    for b, n in enumerate(COUNTS):
        if n == 1:  # which sees all keys
            _, k, _ = cache.sequence(b)
            own_q = q[sum(COUNTS[:b])][:, None].double()
            want = (own_q @ k[0].double().mT / q.shape[-1] ** 0.5).amax((1, 2))
            torch.testing.assert_close(most[b].double(), want, rtol=1e-2, atol=1e-2)


def run(case: VarlenCase, **fields: Any) -> None:
    """Simulate a case with fields of its plan changed, and hold it to the error rule."""
    x = make_varlen_inputs(case)
    problem = packed_problem(*x.arguments(), sinks=x.sinks, **case.options())
    plan = with_fields(plan_of(problem), {"block_m": 64, "block_n": 16, "stream_k": True} | fields)
    out = torch.empty(problem.total_q, case.num_heads_q, case.head_dim_v, dtype=x.q.dtype)
    lse = torch.empty(case.num_heads_q, problem.total_q)
    tensors = (as_batch(t) for t in (x.q, x.k, x.v))
    simulate(problem, plan, *tensors, None, out, lse, None, x.others, seed=case.seed)
    report = varlen_error_report(out, lse, case, x)
    assert report is None or report.ok, f"{case.describe()}: {report}"


@pytest.mark.thorough
@pytest.mark.usefixtures("cut_small_calls")
@pytest.mark.parametrize("fields", [{}, {"keys_of_chunk": 64}, {"num_stages": 1}], ids=str)
def test_any_lengths_with_any_schedule(fields: dict[str, Any]) -> None:
    """With totals too: a piece of packed queries may be longer than a chunk of keys."""
    for seed in range(20):
        draw = random.Random(seed)
        batch = draw.randint(1, 40)
        queries = [draw.choice((0, 1, 1, 1, 2, 9, 22, 70)) for _ in range(batch)]
        keys = [draw.choice((0, 1, 16, 40, 333)) for _ in range(batch)]
        keys[draw.randrange(batch)] = 4 * sum(queries) + 64  # few queries beside them
        case = dataclasses.replace(
            CASE, lengths_q=tuple(queries), lengths_k=tuple(keys), seed=seed,
            num_heads_q=draw.choice((1, 3, 7)), num_heads_kv=1,
        )  # fmt: skip
        run(case, **fields)


def problem_with(**changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "batch": 64, "total_q": 64, "total_k": 64 * 4096, "seqlen_q": 1, "seqlen_k": 4096,
        "num_heads_q": 32, "num_heads_kv": 8, "head_dim": 128, "head_dim_v": 128,
    }  # fmt: skip
    return dataclasses.replace(problem_of(CASE), **{**fields, **changes})


def test_which_calls_are_cut() -> None:
    for arch in (75, 80, 86, 89, 90, 100, 120):
        assert plan_of(problem_with(), arch).stream_k
    one = {"batch": 1, "total_q": 1, "total_k": 2**16, "seqlen_k": 2**16}
    assert plan_of(problem_with(**one)).stream_k
    assert plan_of(problem_with(num_heads_q=8)).stream_k
    assert plan_of(problem_with(total_q=64 * 16, seqlen_q=16)).stream_k
    assert plan_of(problem_with(total_q=64 * 512, seqlen_q=512)).stream_k
    # Prompts over themselves, short caches; and neighbours that must not decide.
    assert not plan_of(problem_with(total_q=64 * 16, seqlen_q=16, total_k=64 * 16)).stream_k
    short = {"batch": 16, "total_q": 16, "total_k": 16 * 256, "seqlen_k": 256}
    assert not plan_of(problem_with(**short, num_heads_kv=1)).stream_k
    assert not plan_of(problem_with(batch_invariant=True)).stream_k


def test_a_piece_may_have_more_keys_than_one_sum() -> None:
    """Its totals take registers, which leave room for fewer blocks, and on sm_75 for none."""
    long = {"seqlen_k": 2 * MAX_KEYS_OF_A_SUM, "total_k": 128 * MAX_KEYS_OF_A_SUM}
    few, many = plan_of(problem_with()), plan_of(problem_with(**long))
    assert few.constants()["KEY_TILES_OF_CHUNK"] == 0
    assert many.constants()["KEY_TILES_OF_CHUNK"] == many.keys_of_chunk // many.block_n > 0
    assert many.stream_k
    assert not many.has_fixed_pieces
    assert many.min_blocks < few.min_blocks
    assert not plan_of(problem_with(**long, head_dim=256, head_dim_v=256), 75).stream_k


def test_scratch_does_not_grow_with_lengths() -> None:
    """Two slots a block, of as many rows as a row tile has."""
    shapes = []
    for keys in (2**17, 2**18):
        problem = problem_with(seqlen_k=keys, total_k=64 * keys)
        plan = plan_of(problem)
        shapes.append(stream_k.share_shapes(problem, plan))
        assert shapes[-1]["split_out"][1] == plan.block_m
    assert shapes[0] == shapes[1]


def test_heads_are_rows_of_one_in_ranges_alone() -> None:
    plan = plan_of(problem_with())
    assert PORTABLE.is_legal(plan)
    assert not PORTABLE.is_legal(dataclasses.replace(plan, stream_k=False))
    assert not PORTABLE.is_legal(dataclasses.replace(plan, block_m=128))
