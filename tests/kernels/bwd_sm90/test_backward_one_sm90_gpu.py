"""Test on a Hopper GPU the gradients by one kernel, through `attention` and autograd: right, and
the same bits in every run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gradient_rule import wrong_gradients

import flashcore
from flashcore.backends.gradients import choose_backward
from flashcore.kernels.bwd_sm90 import plan_one
from flashcore.problem import Problem

pytestmark = pytest.mark.gpu
Leaves = list[torch.Tensor]


@pytest.fixture(autouse=True)
def _by_one_kernel_on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(plan_one, "pays", lambda problem, num_bytes: num_bytes > 0)
    flashcore.set_gradient_workspace()
    yield
    flashcore.set_gradient_workspace()


def made(seed: int, heads: tuple[int, int], rows: int, keys: int, dim: int, batch: int = 2):
    """Return q, k, v and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(heads: int, length: int) -> torch.Tensor:
        shape = batch, heads, length, dim
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    leaves = [normal(heads[0], rows), normal(heads[1], keys), normal(heads[1], keys)]
    return [x.requires_grad_() for x in leaves], normal(heads[0], rows)


def gradients(leaves: Leaves, dout: torch.Tensor, **options: object) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(flashcore.attention(*leaves, **options), leaves, dout)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head_dim", range(8, 136, 8))
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_right(head_dim: int, causal: bool, softcap: float | None) -> None:
    options = {"causal": causal, "softcap": softcap}
    for rows, keys, heads_kv in ((333, 333, 4), (70, 900, 2), (900, 70, 1)):
        leaves, dout = made(head_dim, (4, heads_kv), rows, keys, head_dim)
        problem = Problem.from_tensors(*leaves, return_lse=True, **options)
        assert choose_backward(problem).reason == "one fused kernel for Hopper, deterministic"
        for _ in range(3):  # prepared, and found again
            out, lse = flashcore.attention(*leaves, return_lse=True, **options)
            found = torch.autograd.grad(out, leaves, dout)
            empty = lse == -torch.inf
            given = dout.masked_fill(empty[..., None], 0.0)
            x = [leaf.detach() for leaf in leaves]
            assert not wrong_gradients(found, *x, None, given, None, options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128])
def test_masks_of_every_head(head_dim: int, dtype: torch.dtype) -> None:
    """Heads of a group have masks of their own, of rows that begin anywhere; some see nothing."""
    for rows, keys, causal in ((333, 451, False), (520, 520, True), (900, 70, False)):
        leaves, dout = made(head_dim, (4, 2), rows, keys, head_dim)
        mask = torch.randn(1, 4, rows, keys, device="cuda")
        mask[..., rows // 2, :] = -torch.inf
        mask = mask > -1.0 if dtype == torch.bool else mask.to(dtype)
        problem = Problem.from_tensors(*leaves, mask=mask, causal=causal, return_lse=True)
        has_room = plan_one.obstacle(problem) is None
        assert has_room == (head_dim <= {torch.bool: 128, torch.float32: 64}.get(dtype, 96))
        assert ("one fused kernel" in choose_backward(problem).reason) == has_room
        options = {"mask": mask, "causal": causal}
        out, lse = flashcore.attention(*leaves, return_lse=True, **options)
        given = dout.masked_fill((lse == -torch.inf)[..., None], 0.0)
        x = [leaf.detach() for leaf in leaves]
        for _ in range(3):
            found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            assert not wrong_gradients(found, *x, mask, given, None, {"causal": causal})


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (-1, 200)}], ids=str)
def test_a_hundred_runs_give_the_same_bits(head_dim: int, options: dict[str, object]) -> None:
    """More tiles of keys than SMs, in heads of a group; short heads; other shares of the heads."""
    for heads, rows, keys, batch in (((8, 2), 2200, 4500, 2), ((16, 16), 520, 520, 4)):
        leaves, dout = made(head_dim, heads, rows, keys, head_dim, batch)
        first = gradients(leaves, dout, **options)
        differ = sum(
            not all(map(torch.equal, gradients(leaves, dout, **options), first)) for _ in range(100)
        )
        assert differ == 0
        flashcore.set_gradient_workspace(1)  # a head at a time
        assert all(map(torch.equal, gradients(leaves, dout, **options), first))
        flashcore.set_gradient_workspace()


def test_two_streams_at_once_wait_for_nobody_that_has_no_room() -> None:
    """Blocks of one launch take SMs from the other, whose blocks that run wait for each other."""
    passes = [made(seed, (8, 8), 2048, 4096, 64 + 64 * seed) for seed in range(2)]
    expected = [gradients(*x, causal=True) for x in passes]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in passes]
    found: list[list[tuple[torch.Tensor, ...]]] = [[], []]
    for _ in range(20):
        for stream, x, results in zip(streams, passes, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(gradients(*x, causal=True))
    torch.cuda.synchronize()
    for results, same in zip(found, expected, strict=True):
        assert all(all(map(torch.equal, x, same)) for x in results)


def test_a_graph_is_replayed() -> None:
    (leaves, dout), num_bytes = made(0, (4, 4), 1500, 1500, 128), 4 << 20
    flashcore.set_gradient_workspace(num_bytes)  # two shares
    expected = gradients(leaves, dout)
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
        assert all(map(torch.equal, found, expected))


def test_graphs_are_replayed_side_by_side() -> None:
    """Captured one after the other, replayed at once on two streams, beside eager calls: who shared
    a counter, a turn or a sum of dq with the other would be wrong, or wait for ever."""
    leaves, dout = made(12, (8, 2), 2048, 2048, 128)
    expected = gradients(leaves, dout, causal=True)
    captured = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = gradients(leaves, dout, causal=True)
        captured.append((graph, found, torch.cuda.Stream()))
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, _, stream in captured:
            with torch.cuda.stream(stream):
                graph.replay()
        gradients(leaves, dout, causal=True)
    torch.cuda.synchronize()
    for _, found, _ in captured:
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
