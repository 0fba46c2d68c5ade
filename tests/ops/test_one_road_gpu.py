"""Test on a GPU that drop-in functions and backward passes that were prepared compute the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import flashcore
from flashcore.compat.flash_attn import flash_attn_func
from flashcore.ops.dense import OPERATORS
from flashcore.problem.options import Options, Wanted

pytestmark = pytest.mark.gpu


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float16)


@pytest.mark.parametrize("seqlen_q", [1, 7, 300])
@pytest.mark.parametrize("heads_kv", [8, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_first_are_those_of_attention(seqlen_q: int, heads_kv: int, causal: bool) -> None:
    for _ in range(3):
        q, k, v = randn(2, seqlen_q, 8, 64), *(randn(2, 333, heads_kv, 64) for _ in range(2))
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        expected = flashcore.attention(*heads_first, causal=causal).transpose(1, 2)
        out = flash_attn_func(q, k, v, causal=causal)
        assert out.is_contiguous()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_the_drop_in_is_torchs(causal: bool) -> None:
    for _ in range(3):
        q, k, v = (randn(2, 8, 300, 64) for _ in range(3))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out = flashcore.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


def gradients_by_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, ...]:
    options = Options.checked(causal, None, None, None)
    with torch.no_grad():
        out, lse, _ = OPERATORS.forward(q, k, v, None, None, *options, *Wanted(True), "auto")
        found = OPERATORS.backward(
            dout, None, q, k, v, None, None, out, lse, *options, False, False, "auto"
        )
    return tuple(found[:3])


@pytest.mark.parametrize("causal", [False, True])
def test_a_prepared_backward_pass_is_the_operators(causal: bool) -> None:
    for _ in range(3):
        leaves = [randn(2, 8, 300, 64).requires_grad_() for _ in range(3)]
        dout = randn(2, 8, 300, 64)
        found = torch.autograd.grad(flashcore.attention(*leaves, causal=causal), leaves, dout)
        for x, y in zip(found, gradients_by_operator(*leaves, dout, causal), strict=True):
            assert torch.equal(x, y)


def test_a_backward_pass_can_be_captured_before_and_after_it_is_known() -> None:
    leaves = [randn(1, 4, 130, 64).requires_grad_() for _ in range(3)]
    dout = randn(1, 4, 130, 64)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(flashcore.attention(*leaves, causal=True), leaves, dout)

    expected = step()
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_backward_pass_may_be_the_first_that_its_thread_does_on_the_gpu() -> None:
    """The child ends without finalising its interpreter, for torch may abort there.

    torch's thread of the device lets go of the graph after it has told the caller that gradients
    are there, and takes the GIL for that. Where it asks while the interpreter is being finalised,
    Python (before 3.14) ends the thread from within a destructor: "terminate called without an
    active exception". Programs without flashcore abort there, too, with a Python
    autograd.Function as with x * 2: on an H200, 8 of 9 children that kept the GIL from the pass to
    their end.
    """
    program = (
        "import os, torch, flashcore\n"
        "x = torch.randn(1, 2, 64, 64, device='cuda', dtype=torch.float16, requires_grad=True)\n"
        "(dx,) = torch.autograd.grad(flashcore.attention(x, x, x), x, torch.ones_like(x))\n"
        "assert dx.isfinite().all()\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
