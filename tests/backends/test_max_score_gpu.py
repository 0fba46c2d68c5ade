"""Test `return_max_score` where only a GPU shows it: the same bits on every run, streams, CUDA
graphs, calls that were prepared, both launchers. Values are compared with
the oracle's in test_max_score.py, on a GPU too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashcore
from flashcore.checks.accuracy import lse_error
from flashcore.checks.reference import max_score_oracle
from flashcore.launch import launcher

pytestmark = pytest.mark.gpu

LIMIT = 1e-4
BACKENDS = ("wmma", "auto")


def tensors(seed: int, seqlen: int = 1000, heads: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(2, n, seqlen, 128, device="cuda", generator=generator).half()
        for n in (heads, heads // 2, heads // 2)
    )
    return q, k, v


def largest(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    result = flashcore.attention(q, k, v, return_max_score=True, **options)
    return result[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seqlen", [1, 129, 1000, 4100])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 20.0}], ids=str)
def test_it_is_the_same_on_every_run(options: dict[str, Any], seqlen: int, backend: str) -> None:
    """New values each time: a call that was prepared starts from -inf again."""
    for seed in range(3):
        q, k, v = tensors(seed, seqlen)
        found = [largest(q, k, v, backend=backend, **options) for _ in range(5)]
        assert lse_error(found[0], max_score_oracle(q, k, **options)) <= LIMIT
        assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_starts_anew_on_every_replay(backend: str) -> None:
    q, k, v = tensors(0)
    largest(q, k, v, causal=True, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, max_score = flashcore.attention(
            q, k, v, causal=True, return_max_score=True, backend=backend
        )
    for factor in (3.0, 1.0, 0.1):
        for x, fresh in zip((q, k, v), tensors(1), strict=True):
            x.copy_(fresh)
        q.mul_(factor)
        graph.replay()
        assert lse_error(max_score, max_score_oracle(q, k, causal=True)) <= LIMIT
        # Another build of the kernel, which may round elsewhere.
        want = flashcore.attention(q, k, v, causal=True, backend=backend)
        torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)


def test_streams_do_not_disturb_each_other() -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [tensors(seed) for seed in range(3)]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[] for _ in streams]
    for _ in range(20):
        for stream, x, results in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(largest(*x, causal=True))
    torch.cuda.synchronize()
    for (q, k, _), results in zip(inputs, found, strict=True):
        assert lse_error(results[0], max_score_oracle(q, k, causal=True)) <= LIMIT
        assert all(torch.equal(x, results[0]) for x in results)


@pytest.mark.parametrize("name", ["python", "compiled"])
def test_either_launcher(name: str) -> None:
    q, k, v = tensors(0)
    with launcher.using(name):
        plain = flashcore.attention(q, k, v)
        for _ in range(2):
            out, lse, max_score = flashcore.attention(
                q, k, v, return_lse=True, return_max_score=True
            )
            assert lse_error(max_score, max_score_oracle(q, k)) <= LIMIT
            assert lse.shape == q.shape[:3]
            torch.testing.assert_close(out, plain, atol=2e-3, rtol=2e-3)
            assert torch.equal(flashcore.attention(q, k, v), plain)


def test_training_with_it_has_the_gradients_without() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(0))
    dout = torch.randn_like(q)
    plain = torch.autograd.grad(flashcore.attention(q, k, v, causal=True), (q, k, v), dout)
    out, max_score = flashcore.attention(q, k, v, causal=True, return_max_score=True)
    assert not max_score.requires_grad
    for have, want in zip(torch.autograd.grad(out, (q, k, v), dout), plain, strict=True):
        torch.testing.assert_close(have, want, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_and_padded_calls_that_were_prepared(backend: str) -> None:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in tensors(0, 900))
    for ends in ([0, 300, 301, 900], [0, 0, 450, 890], [0, 300, 301, 900]):
        cu = torch.tensor(ends, dtype=torch.int32, device="cuda")
        _, found = flashcore.attention_varlen(
            q, k, v, cu, cu, 900, 900, causal=True, return_max_score=True, backend=backend
        )
        for b in range(3):
            own = slice(ends[b], ends[b + 1])
            x, y = (t[own].transpose(0, 1)[None] for t in (q, k))
            assert lse_error(found[b : b + 1], max_score_oracle(x, y, causal=True)) <= LIMIT
    q, k, v = tensors(1, 300)
    for lengths in ([300, 1], [0, 299]):
        seqlens_k = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        found = largest(q, k, v, seqlens_k=seqlens_k, backend=backend)
        for b, n in enumerate(lengths):
            want = max_score_oracle(q[b : b + 1], k[b : b + 1, :, :n])
            assert lse_error(found[b : b + 1], want) <= LIMIT
