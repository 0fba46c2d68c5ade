"""Test on a GPU that training steps which go around the dispatcher compute what operators do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashcore
from flashcore.launch import launcher

pytestmark = pytest.mark.gpu

Tensor = torch.Tensor


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float16)


def padded(q: Tensor, k: Tensor, v: Tensor, seed: int, **options: Any) -> Any:
    lengths = torch.tensor([300 - seed, 17 + seed], dtype=torch.int32, device="cuda")
    return flashcore.attention(q, k, v, seqlens_k=lengths, **options)


def packed(q: Tensor, k: Tensor, v: Tensor, seed: int, **options: Any) -> Any:
    ends = torch.tensor([0, 100 + seed, 100 + seed, 590], dtype=torch.int32, device="cuda")
    return flashcore.attention_varlen(q, k, v, ends, ends, 500, 500, **options)


def dense(q: Tensor, k: Tensor, v: Tensor, seed: int, **options: Any) -> Any:
    del seed
    return flashcore.attention(q, k, v, **options)


def mask() -> Tensor:
    return torch.rand(2, 1, 300, 300, device="cuda", generator=torch.Generator("cuda")) > 0.25


Step = Callable[[int], list[Tensor]]
CALLS: dict[str, tuple[Callable[..., Any], tuple[int, ...], dict[str, Any]]] = {
    "padded": (padded, (2, 8, 300, 64), {}),
    "padded, causal": (padded, (2, 8, 300, 128), {"causal": True}),
    "padded, mask": (padded, (2, 8, 300, 64), {"mask": mask}),
    "packed": (packed, (600, 8, 64), {}),
    "packed, window": (packed, (600, 8, 128), {"causal": True, "window": (64, 0)}),
    "dense, mask": (dense, (2, 8, 300, 64), {"mask": mask}),
}


def step_of(name: str) -> Step:
    """Return what gives out and the gradients of inputs and lengths that follow from a number."""
    call, shape, options = CALLS[name]

    def step(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        given = {key: value() if callable(value) else value for key, value in options.items()}
        leaves = [randn(*shape).requires_grad_() for _ in range(3)]
        dout = randn(*shape)
        out = call(*leaves, seed, **given)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return step


@pytest.mark.parametrize("name", CALLS)
def test_a_step_is_the_operators_bit_by_bit(name: str) -> None:
    """Lengths and addresses change from step to step, and what was prepared does not."""
    step = step_of(name)
    for seed in range(4):
        found = step(seed)
        with torch.overrides.BaseTorchFunctionMode():
            expected = step(seed)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


def check_threads_and_streams(
    gradients: Callable[[list[Tensor]], tuple[Tensor, ...]], shape: tuple[int, ...]
) -> None:
    """Check that threads, each on a stream of its own, get the gradients of their tensors."""
    sets = [[randn(*shape).requires_grad_() for _ in range(3)] for _ in range(4)]
    expected = [gradients(leaves) for leaves in sets]
    torch.cuda.synchronize()
    found: dict[int, tuple[Tensor, ...]] = {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                found[number] = gradients(sets[number])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate(expected):
        assert all(torch.equal(x, y) for x, y in zip(found[number], wanted, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_threads_and_streams_do_not_disturb_each_other(name: str) -> None:
    call, shape, options = CALLS[name]
    torch.manual_seed(0)
    given = {key: value() if callable(value) else value for key, value in options.items()}
    dout = randn(*shape)

    def gradients(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*leaves, 1, **given), leaves, dout)

    check_threads_and_streams(gradients, shape)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_give_the_same_gradients(name: str, use_reentrant: bool) -> None:
    call, shape, options = CALLS[name]
    torch.manual_seed(0)
    given = {key: value() if callable(value) else value for key, value in options.items()}
    leaves = [randn(*shape).requires_grad_() for _ in range(3)]
    dout = randn(*shape)

    def attend(*x: Tensor) -> Any:
        return call(*x, 1, **given)

    expected = torch.autograd.grad(attend(*leaves), leaves, dout)
    checkpoint(attend, *leaves, use_reentrant=use_reentrant).backward(dout)
    for x, y in zip(leaves, expected, strict=True):
        assert torch.equal(x.grad, y)


@pytest.fixture
def compiled() -> Iterator[None]:
    """Launch by the compiled launcher, if it can be built here."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(launcher.using("compiled"))
        except (flashcore.FlashCoreError, OSError, ImportError) as error:
            pytest.skip(f"no launcher: {error}")
        yield


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("causal", [False, True])
def test_the_compiled_launcher_gives_pythons_gradients(causal: bool) -> None:
    torch.manual_seed(0)
    leaves = [randn(2, 8, 300, 64).requires_grad_() for _ in range(3)]
    dout = randn(2, 8, 300, 64)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(flashcore.attention(*leaves, causal=causal), leaves, dout)

    with launcher.using("python"):
        expected = step()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(step(), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    checkpoint(
        lambda *x: flashcore.attention(*x, causal=causal), *leaves, use_reentrant=False
    ).backward(dout)
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, expected, strict=True))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("causal", [False, True])
def test_threads_and_streams_of_the_compiled_launcher(causal: bool) -> None:
    torch.manual_seed(0)
    shape = 2, 8, 300, 64
    dout = randn(*shape)
    check_threads_and_streams(
        lambda x: torch.autograd.grad(flashcore.attention(*x, causal=causal), x, dout), shape
    )
