"""Test keys of a row tile split over blocks on a GPU; see test_split_keys.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcore
from backends import check, check_case
from flashcore.checks.accuracy import error_report
from flashcore.kernels.fwd_sm90 import params as params_sm90
from flashcore.launch.kernel_call import run_kernel
from flashcore.ops.paged import attention_paged
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan

pytestmark = pytest.mark.gpu

DECODE = [
    Case(num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_k=4096, head_dim=128, head_dim_v=128),
    Case(batch=3, num_heads_q=4, num_heads_kv=4, seqlen_q=7, seqlen_k=3001, causal="lower_right"),
    Case(num_heads_q=16, num_heads_kv=1, seqlen_q=4, seqlen_k=5000, window=(700, 0), tail=2),
    Case(num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_k=2050, mask="padding", softcap=9.0),
    Case(seqlen_q=150, seqlen_k=9000, head_dim=256, head_dim_v=256, causal="lower_right"),
    Case(seqlen_q=1, seqlen_k=4096, head_dim=80, head_dim_v=40, dtype="bfloat16", layout="bshd"),
    Case(num_heads_q=32, num_heads_kv=1, seqlen_q=1, seqlen_k=16384, head_dim=128, head_dim_v=128),
    Case(num_heads_q=24, num_heads_kv=2, seqlen_q=2, seqlen_k=8192, window=(5000, 0), tail=0),
    Case(num_heads_q=32, num_heads_kv=8, batch=40, seqlen_q=1, seqlen_k=1111, head_dim=64),
]


@pytest.mark.parametrize("case", DECODE, ids=Case.describe)
def test_on_a_gpu(case: Case) -> None:
    check_case("auto", case)


@pytest.mark.parametrize(("heads_kv", "seqlen_k"), [(8, 4096), (1, 16384)])  # one adds up, or all
def test_on_a_gpu_results_are_the_same_bit_for_bit_and_graphs_may_be_replayed(
    heads_kv: int, seqlen_k: int
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the portable kernel splits no keys")
    shapes = (32, 1), (heads_kv, seqlen_k), (heads_kv, seqlen_k)
    q, k, v = (torch.randn(1, *shape, 128).half().cuda() for shape in shapes)
    want, want_lse = check("auto", q, k, v)
    for _ in range(50):
        out, lse = flashcore.attention(q, k, v, return_lse=True)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [flashcore.attention(q, k, v) for _ in range(3)]
    other = torch.cuda.Stream()
    for _ in range(20):
        for captured in outs:
            captured.zero_()
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(other):  # beside the graph: counters and scratch of its own
            beside = flashcore.attention(q, k, v)
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in (*outs, beside))


def test_on_a_gpu_results_do_not_depend_on_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few looks at the counter most blocks leave, and the others add up all shares."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the portable kernel splits no keys")
    q = torch.randn(2, 32, 1, 128).half().cuda()
    k, v = torch.randn(2, 2, 1, 8192, 128).half().cuda()
    problem = Problem.from_tensors(q, k, v)
    plan = select_plan(problem)
    want, _ = check("auto", q, k, v)
    for most_polls in (32, 1, 2, 3, 32):
        monkeypatch.setattr(params_sm90, "_MOST_POLLS", most_polls)
        for _ in range(20):
            out = torch.full_like(q, torch.nan)
            run_kernel(problem, plan, q, k, v, None, out, None)
            assert torch.equal(out, want)


@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("heads", [(32, 8), (71, 1), (4, 4)])
def test_on_a_gpu_work_is_cut_by_lengths(in_pages: bool, heads: tuple[int, int]) -> None:
    """Each sequence is right, whatever the others' lengths, which a graph is replayed with."""
    batch, room, page = 37, 4096, 16
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads[0], 1, 64, generator=generator).half().cuda()
    k, v = torch.randn(2, batch, heads[1], room, 64, generator=generator).half().cuda()
    seqlens_k = torch.zeros(batch, dtype=torch.int32, device="cuda")
    if in_pages:
        table = torch.arange(batch * room // page, dtype=torch.int32, device="cuda").view(batch, -1)
        pages = [
            x.view(batch, heads[1], -1, page, 64).transpose(1, 2).flatten(0, 1) for x in (k, v)
        ]

    def call() -> Any:
        if in_pages:
            return attention_paged(q, *pages, table, seqlens_k, return_lse=True)
        return flashcore.attention(q, k, v, seqlens_k=seqlens_k, return_lse=True)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for seed in range(4):
        drawn = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, (4, 70, 700, room + 1)[seed], (batch,), generator=drawn)
        lengths[seed] = room
        seqlens_k.copy_(lengths)
        graph.replay()
        again, again_lse = call()
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)
        for b, n in enumerate(lengths.tolist()):
            own = slice(b, b + 1)
            sequence = q[own], k[own, :, :n], v[own, :, :n]
            report = error_report(out[own], *sequence, lse=lse[own])
            assert report.ok, f"sequence {b} of {n} keys: {report}"
