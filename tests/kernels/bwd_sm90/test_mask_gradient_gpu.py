"""Test on a Hopper GPU the gradient of an additive mask, through `attention` and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from gradient_rule import wrong_gradients, wrong_mask_gradient

import flashcore
from flashcore.backends.gradients import choose_backward
from flashcore.problem import Problem

pytestmark = pytest.mark.gpu
SHAPES = ("bhqk", "1hqk", "11qk", "b1qk", "b11k", "111k", "1hq1", "qk", "k", "1111")


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def make(dims: str, dtype: torch.dtype, lengths: tuple[int, int], head_dim: int = 64):
    """Return leaves q, k, v and mask, and what arrives at out."""
    generator = torch.Generator("cuda").manual_seed(len(dims) + lengths[0])

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    sizes = {"b": 3, "h": 4, "q": lengths[0], "k": lengths[1], "1": 1}
    mask = normal(*[sizes[d] for d in dims]).to(dtype)
    half = [normal(3, heads, n, head_dim).bfloat16() for heads, n in zip(
        (4, 2, 2, 4), (lengths[0], lengths[1], lengths[1], lengths[0]), strict=True)]  # fmt: skip
    return [x.requires_grad_() for x in (*half[:3], mask)], half[3]


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_broadcast(dims: str, dtype: torch.dtype) -> None:
    for lengths, causal in itertools.product(((300, 333), (256, 512), (129, 100)), (False, True)):
        leaves, dout = make(dims, dtype, lengths)
        q, k, v, mask = leaves
        problem = Problem.from_tensors(q, k, v, mask=mask, return_lse=True, causal=causal)
        choice = choose_backward(problem, mask_grad_elements=mask.numel())
        assert choice.code == "sm90"
        out, lse = flashcore.attention(q, k, v, mask=mask, causal=causal, return_lse=True)
        found = torch.autograd.grad(out, leaves, dout)
        options = {"causal": causal}
        given = dout.masked_fill((lse == -torch.inf)[..., None], 0.0)
        assert not wrong_mask_gradient(found[3], *leaves, given, None, options, out)
        assert not wrong_gradients(found[:3], q, k, v, mask.detach(), given, None, options, out)


@pytest.mark.parametrize("head_dim", [8, 32, 96, 128, 192, 256])
def test_every_head_dim(head_dim: int) -> None:
    leaves, dout = make("1hqk", torch.bfloat16, (270, 400), head_dim)
    q, k, v, mask = leaves
    out = flashcore.attention(q, k, v, mask=mask, softcap=9.0)
    found = torch.autograd.grad(out, leaves, dout)
    assert not wrong_mask_gradient(found[3], *leaves, dout, None, {"softcap": 9.0}, out)


@pytest.mark.parametrize("dims", ["1hqk", "11qk", "111k"])
def test_the_same_bits_in_every_run(dims: str) -> None:
    leaves, dout = make(dims, torch.float32, (700, 900))
    q, k, v, mask = leaves
    out = flashcore.attention(q, k, v, mask=mask)
    first = torch.autograd.grad(out, mask, dout, retain_graph=True)[0]
    for _ in range(100):
        assert torch.equal(first, torch.autograd.grad(out, mask, dout, retain_graph=True)[0])


def test_memory_beside_the_gradient_is_bounded() -> None:
    """A mask of all heads and batches: nothing as large as the scores is stored."""
    leaves, dout = make("11qk", torch.bfloat16, (4096, 4096))
    q, k, v, mask = leaves
    out = flashcore.attention(q, k, v, mask=mask)
    torch.autograd.grad(out, leaves, dout, retain_graph=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(out, leaves, dout)
    results = sum(x.numel() * x.element_size() for x in found)
    assert torch.cuda.max_memory_allocated() - before - results < 80 << 20


def test_in_a_cuda_graph_with_the_forward() -> None:
    leaves, dout = make("1hqk", torch.bfloat16, (300, 300))
    q, k, v, mask = leaves

    def step():
        return torch.autograd.grad(flashcore.attention(q, k, v, mask=mask), leaves, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
