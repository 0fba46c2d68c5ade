"""Test on a Hopper GPU the gradients by one kernel, through `attention` and autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gradient_rule import wrong_gradients

import flashcore
from flashcore.backends.gradients import choose_backward
from flashcore.problem import Problem

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _allowed_on_hopper() -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    flashcore.allow_nondeterministic_gradients()
    yield
    flashcore.allow_nondeterministic_gradients(False)


@pytest.mark.parametrize("head_dim", range(8, 136, 8))
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_right(head_dim: int, causal: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(head_dim)
    for rows, keys, heads_kv in ((333, 333, 4), (70, 900, 2), (900, 70, 1)):

        def normal(heads: int, length: int) -> torch.Tensor:
            return torch.randn(
                2, heads, length, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator
            )

        x = normal(4, rows), normal(heads_kv, keys), normal(heads_kv, keys)
        leaves = [t.clone().requires_grad_() for t in x]
        problem = Problem.from_tensors(*leaves, causal=causal, return_lse=True)
        assert "no fixed order" in choose_backward(problem).reason
        dout = normal(4, rows)
        for _ in range(3):  # prepared, and found again
            out, lse = flashcore.attention(*leaves, causal=causal, return_lse=True)
            found = torch.autograd.grad(out, leaves, dout)
            options = {"causal": causal}
            empty = lse == -torch.inf
            given = dout.masked_fill(empty[..., None], 0.0)
            assert not wrong_gradients(found, *x, None, given, None, options)


def test_torchs_deterministic_algorithms_forbid_it() -> None:
    x = torch.randn(1, 4, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (
            torch.autograd.grad(flashcore.attention(x, x, x), x, torch.ones_like(x))[0]
            for _ in range(5)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, other) for other in others)
