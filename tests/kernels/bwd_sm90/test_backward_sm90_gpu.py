"""Test the fused backward on a Hopper GPU, through `attention` and autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gradient_rule import forward, wrong_gradients
from test_backward_sm90 import FAMILIES
from test_sim_healthy import draw_case

import flashcore
from flashcore.backends.backward_sm90 import fused_backward, run_on_gpu
from flashcore.backends.gradients import choose_backward
from flashcore.checks.cases import make_inputs
from flashcore.problem import Problem
from flashcore.problem.case import Case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _only_on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def check(case: Case, through_lse: bool = False) -> None:
    x = make_inputs(case, "cuda")
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    problem = Problem.from_tensors(*leaves, mask=x.mask, return_lse=True, **case.options())
    choice = choose_backward(problem, through_lse=through_lse)
    assert choice.code == "sm90" or problem.load_bytes < 16, choice.reason
    out, lse = flashcore.attention(*leaves, mask=x.mask, return_lse=True, **case.options())
    empty = lse == -math.inf
    generator = torch.Generator().manual_seed(case.seed)
    dout = torch.randn(out.shape, generator=generator).to(out)
    dout = dout.masked_fill(empty[..., None], math.nan)
    dlse = torch.randn(lse.shape, generator=generator).to(lse) if through_lse else None
    dlse = None if dlse is None else dlse.masked_fill(empty, math.nan)
    results, cotangents = ([out, lse], [dout, dlse]) if through_lse else ([out], [dout])
    gradients = torch.autograd.grad(results, leaves, cotangents)
    inputs = x.q, x.k, x.v, x.mask
    wrong = wrong_gradients(gradients, *inputs, dout, dlse, case.options(), out.detach())
    assert not wrong, f"{case.describe()}: {wrong}"


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_right(name: str) -> None:
    for seed in range(40):
        check(draw_case(FAMILIES[name][1], seed), through_lse=seed % 2 == 1)


@pytest.mark.parametrize("head_dim", range(8, 264, 8))
def test_every_head_dim(head_dim: int) -> None:
    for dtype, causal in itertools.product(("float16", "bfloat16"), ("none", "lower_right")):
        check(
            Case(
                batch=2,
                num_heads_q=4,
                num_heads_kv=2,
                seqlen_q=333,
                seqlen_k=517,
                head_dim=head_dim,
                head_dim_v=head_dim,
                dtype=dtype,
                causal=causal,
                layout="bshd",
            )
        )


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("causal", ["none", "lower_right", "upper_left"])
def test_many_tiles_a_block(head_dim: int, causal: str) -> None:
    """More tiles than blocks, so that blocks draw several, one after the other."""
    check(
        Case(
            batch=3,
            num_heads_q=12,
            num_heads_kv=6,
            seqlen_q=1100,
            seqlen_k=1203,
            head_dim=head_dim,
            head_dim_v=head_dim,
            dtype="bfloat16",
            causal=causal,
        ),
        through_lse=True,
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_bit_by_bit_the_same_a_hundred_times(head_dim: int, causal: bool) -> None:
    q, k, v, dout = (
        torch.randn(2, 8, 2000, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    problem, out, lse = forward(q, k, v, None, {"causal": causal})
    first = fused_backward(problem, q, k, v, None, out, lse, dout, None, run_on_gpu)
    for _ in range(100):
        again = fused_backward(problem, q, k, v, None, out, lse, dout, None, run_on_gpu)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_graph_of_forward_and_backward_replays() -> None:
    leaves = [
        torch.randn(2, 4, 700, 128, device="cuda", dtype=torch.float16).requires_grad_()
        for _ in range(3)
    ]
    dout = torch.randn(2, 4, 700, 128, device="cuda", dtype=torch.float16)

    def step():
        return torch.autograd.grad(flashcore.attention(*leaves, causal=True), leaves, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (*leaves, dout):
                x.normal_()
        graph.replay()
        want = step()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_several_streams_at_once() -> None:
    inputs = [
        [torch.randn(1, 4, 900, 64, device="cuda", dtype=torch.float16) for _ in range(4)]
        for _ in range(4)
    ]

    def gradients(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(flashcore.attention(*leaves, causal=True), leaves, dout)

    want = [gradients(*tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        found = []
        for stream, tensors in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(gradients(*tensors))
        torch.cuda.synchronize()
        for some, others in zip(found, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
