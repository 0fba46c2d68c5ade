"""Test on a Hopper GPU the gradients by one kernel whose blocks add to dq in any order, through
`attention` and autograd: right, and in order while torch asks for determinism."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gradient_rule import wrong_gradients
from test_backward_one_sm90_gpu import Leaves, made

import flashcore
from flashcore.backends.gradients import choose_backward
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.problem import Problem

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _by_one_kernel_in_any_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(plan_one, "pays", lambda problem, num_bytes: num_bytes > 0)
    monkeypatch.setattr(plan_one, "any_order_pays", lambda problem: True)
    flashcore.set_gradient_workspace()
    yield
    flashcore.set_gradient_workspace()
    torch.use_deterministic_algorithms(False)


def gradients(leaves: Leaves, dout: torch.Tensor, **options: object) -> tuple[torch.Tensor, ...]:
    options = {"deterministic": False} | options
    return torch.autograd.grad(flashcore.attention(*leaves, **options), leaves, dout)


@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 96, 104, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_right(head_dim: int, causal: bool) -> None:
    """Odd lengths, more keys than rows and fewer, heads of a group; a head at a time, too."""
    for rows, keys, heads_kv in ((333, 333, 4), (71, 901, 2), (901, 71, 1)):
        leaves, dout = made(head_dim, (4, heads_kv), rows, keys, head_dim)
        problem = Problem.from_tensors(*leaves, causal=causal, return_lse=True, deterministic=False)
        assert "dq added up in any order" in choose_backward(problem).reason
        options = {"causal": causal, "deterministic": False}
        for num_bytes in (plan_one_bytes(problem), 1, 1 << 27):
            flashcore.set_gradient_workspace(num_bytes)
            for _ in range(2):  # prepared, and found again
                out, lse = flashcore.attention(*leaves, return_lse=True, **options)
                found = torch.autograd.grad(out, leaves, dout)
                empty = lse == -torch.inf
                given = dout.masked_fill(empty[..., None], 0.0)
                x = [leaf.detach() for leaf in leaves]
                assert not wrong_gradients(found, *x, None, given, None, {"causal": causal})


def plan_one_bytes(problem: Problem) -> int:
    """Return room for the sums of dq of three of a call's heads of k: shares of other sizes."""
    heads, groups, floats = plan_one.sums_shape(problem, 3)
    return heads * groups * floats * 4


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (300, 200)}], ids=str)
def test_long_sequences_are_as_in_order(head_dim: int, options: dict[str, object]) -> None:
    """Many blocks add to the same rows at once; an add that is lost or counted twice is far beyond
    what another order changes."""
    leaves, dout = made(head_dim, (8, 2), 4100, 4500, head_dim)
    ordered = gradients(leaves, dout, deterministic=True, **options)
    first = gradients(leaves, dout, **options)
    for _ in range(10):
        found = gradients(leaves, dout, **options)
        for name, x, y in zip(("dq", "dk", "dv"), found, ordered, strict=True):
            difference = (x.float() - y.float()).abs().max() / y.float().abs().max()
            assert difference < 0.01, name
        assert all(map(torch.equal, found[1:], first[1:])), "dk and dv have one order"


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_may_ask_for_determinism(head_dim: int, causal: bool) -> None:
    leaves, dout = made(head_dim, (8, 2), 2200, 4500, head_dim)
    ordered = gradients(leaves, dout, causal=causal, deterministic=True)
    gradients(leaves, dout, causal=causal)  # prepared before torch asks
    torch.use_deterministic_algorithms(True)
    for _ in range(10):
        assert all(map(torch.equal, gradients(leaves, dout, causal=causal), ordered))


def test_a_graph_is_replayed() -> None:
    """Each replay clears the sums itself."""
    leaves, dout = made(128, (4, 4), 1500, 1500, 128)
    expected = gradients(leaves, dout, deterministic=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(leaves, dout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = gradients(leaves, dout)
    for _ in range(20):
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for x, y in zip(found, expected, strict=True):
            difference = (x.float() - y.float()).abs().max() / y.float().abs().max()
            assert difference < 0.01
