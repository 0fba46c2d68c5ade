"""Test packed sequences whose keys the device cuts into ranges (stream-K on the Hopper kernel,
tile/stream_k.cuh): few queries of few or uneven sequences keep all SMs busy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from packed_pieces import CASE, CASES, COUNTS, LENGTHS, problem_of
from pages import check_packed, packed_over_pages
from parameters import thorough_but

import flashcore
from backends import GPU, SIM90, device_of, on_sim90
from flashcore.backends.packed import packed_problem
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs, varlen_error_report
from flashcore.kernels import cutting, stream_k
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.ops.paged_varlen import attention_paged_varlen
from flashcore.problem import Problem
from flashcore.selection.select import select_plan
from flashcore.sim import SimulationError

every_backend = pytest.mark.parametrize("backend", [SIM90, GPU])


@pytest.fixture(autouse=True)
def cut_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device cut calls that the simulator has time for."""
    monkeypatch.setattr(cutting, "FEW_BYTES", 2**10)


def is_cut(problem: Problem) -> bool:
    plan = select_plan(problem, 90)
    return isinstance(plan, Sm90Plan) and plan.stream_k


@pytest.mark.parametrize("case", thorough_but((CASE,), CASES), ids=VarlenCase.describe)
@every_backend
def test_every_sequence_is_as_if_alone(
    backend: str, case: VarlenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = on_sim90(backend, monkeypatch)
    assert is_cut(problem_of(case))
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


@pytest.mark.parametrize("cache_dtype", thorough_but(("float8_e4m3fn",), ("", "float8_e4m3fn")))
@every_backend
def test_caches_in_pages(backend: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = on_sim90(backend, monkeypatch)
    cache, q, (out, lse, most) = packed_over_pages(
        backend, COUNTS, LENGTHS, cache_dtype=cache_dtype, return_max_score=True
    )
    check_packed(cache, COUNTS, q, out, lse, causal=True)
    begin = 0
    for b, n in enumerate(COUNTS):
        _, k, _ = cache.sequence(b)
        if n == 1:  # which sees all keys
            own_q = q[begin : begin + n].transpose(0, 1)
            scores = own_q.double() @ k[0].double().mT / q.shape[-1] ** 0.5
            want = scores.amax((1, 2))
            torch.testing.assert_close(most[b].double(), want, rtol=1e-2, atol=1e-2)
        begin += n


@pytest.mark.gpu
def test_other_lengths_in_a_recorded_call() -> None:
    """The device cuts the work anew: what a call is told on the host is the most there can be."""
    generator = torch.Generator("cuda").manual_seed(0)
    pages = torch.randn(2, 600, 1, 16, 64, device="cuda", generator=generator).half()
    table = torch.randperm(600, device="cuda", generator=generator).int()[:600].view(4, 150)
    q = torch.randn(9, 4, 64, device="cuda", generator=generator).half()
    ends, told = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (5, 4))

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return attention_paged_varlen(
            q, *pages, table, told, ends, 9, return_lse=True, causal=True, backend="sm90"
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend()
    for counts, keys in (
        ((1, 1, 1, 1), (2400, 3, 1000, 16)),
        ((9, 0, 0, 0), (2000, 5, 0, 90)),
        ((0, 2, 0, 4), (0, 2399, 1, 4)),
        ((1, 1, 1, 6), (0, 0, 0, 0)),
    ):
        ends.copy_(torch.tensor([0, *counts]).cumsum(0))
        told.copy_(torch.tensor(keys))
        graph.replay()
        want, want_lse = attend()
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        k, v = (x[table.long()].transpose(1, 2).reshape(4, 1, 2400, 64) for x in pages)
        for b, (end, n) in enumerate(zip(ends[1:].tolist(), counts, strict=True)):
            if n and keys[b]:
                own = (x[end - n : end].transpose(0, 1)[None] for x in (out, q))
                seen = (x[b : b + 1, :, : keys[b]] for x in (k, v))
                report = error_report(*own, *seen, causal=True)
                assert report.ok, f"{counts} {keys} {b}: {report}"


def test_lengths_that_overlap_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has checked them. They are more work than there is a count for: nothing is done."""
    monkeypatch.setenv(env.SIM_ARCH.name, "90")
    lengths_k = (1100, *[200] * 8)
    x = make_varlen_inputs(dataclasses.replace(CASE, lengths_q=(9,) * 9, lengths_k=lengths_k))
    assert is_cut(packed_problem(*x.arguments(), causal=True))
    wild = torch.tensor([0, 70] * 5, dtype=torch.int32)
    with pytest.raises(SimulationError, match="unwritten-output"):
        flashcore.attention_varlen(
            x.q, x.k, x.v, wild, *x.arguments()[4:], backend="sim", causal=True
        )


def problem_with(**changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "batch": 64, "total_q": 64, "total_k": 64 * 4096, "seqlen_q": 1, "seqlen_k": 4096,
        "num_heads_q": 32, "num_heads_kv": 8, "head_dim": 128, "head_dim_v": 128,
    }  # fmt: skip
    return dataclasses.replace(problem_of(CASE), **{**fields, **changes})


def test_which_calls_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "FEW_BYTES", stream_k.FEW_BYTES)
    assert is_cut(problem_with())
    assert is_cut(problem_with(batch=1, total_q=1, total_k=2**16, seqlen_k=2**16))
    assert is_cut(problem_with(num_heads_q=8))
    assert is_cut(problem_with(total_q=64 * 16, seqlen_q=16))
    # Prompts over themselves, prompts' parts, short caches; and neighbours that must not decide.
    assert not is_cut(problem_with(total_q=64 * 16, seqlen_q=16, total_k=64 * 16))
    assert not is_cut(problem_with(total_q=64 * 512, seqlen_q=512))
    assert not is_cut(problem_with(batch=2, total_q=2, total_k=2048, seqlen_k=1024))
    assert not is_cut(problem_with(batch_invariant=True))


def test_scratch_does_not_grow_with_lengths() -> None:
    """Two slots a block, of as many rows as a row tile has."""
    shapes = []
    for keys in (2**16, 2**18):
        problem = problem_with(seqlen_k=keys, total_k=64 * keys)
        plan = select_plan(problem, 90)
        shapes.append(stream_k.share_shapes(problem, plan))
        assert shapes[-1]["split_out"][1] == plan.block_m
    assert shapes[0] == shapes[1]
