"""Test masks whose rows begin anywhere: the Hopper kernel is given a copy of one that is broadcast,
if the call is large enough."""

from __future__ import annotations

import ctypes
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import pytest
import standin
import torch
from op_inputs import gradients

import flashcore
import flashcore.sim
from backends import GPU, check, device_of
from flashcore.backends import readable
from flashcore.backends.adapting import adapt, kernel_for, rather_portable
from flashcore.backends.readable import copy_of_mask
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.kernels.registry import forward_for
from flashcore.problem import Problem
from flashcore.problem.memory_layout import MaskSpec, mask_spec
from flashcore.sim import simulate

HALF, BOOL = torch.float16, torch.bool
ROWS, KEYS = 20, 37
SIZES = {"b": 2, "h": 4, "q": ROWS, "k": KEYS, "1": 1}


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let calls of any size count as large."""
    monkeypatch.setattr(readable, "_MANY_SCORES", 1)
    monkeypatch.setattr(readable, "_SCORES_OF_ELEMENT_FORWARD", {1: 2, 2: 2, 4: 2})
    adapt.cache_clear()
    yield
    adapt.cache_clear()


def qkv(device: str = "cpu", head_dim: int = 16) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 4, ROWS, head_dim), (2, 2, KEYS, head_dim), (2, 2, KEYS, head_dim)
    q, k, v = (torch.randn(size, generator=generator).to(device, HALF) for size in sizes)
    return q, k, v


def mask_of(dims: str, dtype: torch.dtype, offset: int = 0, device: str = "cpu") -> torch.Tensor:
    """Return a mask that begins so many elements behind the start of its memory, NaN around it."""
    sizes = [SIZES[d] for d in dims]
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(sizes, generator=generator)
    room = values.new_full((*sizes[:-1], sizes[-1] + 2 * offset), torch.nan)
    values = values > -1.0 if dtype == BOOL else values.to(dtype)
    room = torch.ones_like(room, dtype=BOOL) if dtype == BOOL else room.to(dtype)
    room[..., offset : offset + sizes[-1]] = values
    return room.to(device)[..., offset : offset + sizes[-1]]


def on_hopper(q: Any, k: Any, v: Any, mask: torch.Tensor | None, **options: Any) -> Problem:
    described = Problem.from_tensors(q, k, v, mask=mask, **options)
    return dataclasses.replace(described, device="cuda", arch=90)


def of_sizes(
    dims: str, heads: int = 16, rows: int = 1024, keys: int = 1999, **options: Any
) -> Problem:
    """Return a call of which nothing is ever read, of batch 2, with a boolean mask."""
    q, k = (torch.empty(2, heads, seqlen, 64, dtype=HALF) for seqlen in (rows, keys))
    sizes = {"b": 2, "h": heads, "q": rows, "k": keys, "1": 1}
    return on_hopper(q, k, k, torch.empty([sizes[d] for d in dims], dtype=BOOL), **options)


def names_of(problem: Problem, kernel: str = "sm90") -> list[str]:
    return [copy.name for copy in adapt(problem, kernel).copies]


@pytest.mark.parametrize(
    ("dims", "dtype", "offset"),
    [
        ("qk", BOOL, 0),
        ("b1qk", BOOL, 3),
        ("1hqk", HALF, 1),
        ("1hqk", torch.float32, 1),
    ],
    ids=str,
)
def test_the_simulated_kernel_reads_a_copy(
    any_size: None, monkeypatch: pytest.MonkeyPatch, dims: str, dtype: torch.dtype, offset: int
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, "90")
    read: list[tuple[MaskSpec, torch.Tensor]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        read.append((arguments[0].mask, arguments[5]))
        return simulate(*arguments, **options)

    monkeypatch.setattr(flashcore.sim, "simulate", spy)
    q, k, v = qkv()
    mask = mask_of(dims, dtype, offset)
    check("sim", q, k, v, mask=mask)
    ((spec, own),) = read
    assert own.shape == mask.shape
    assert spec.load_bytes == 16
    assert spec == mask_spec(own)
    assert own.data_ptr() != mask.data_ptr()
    assert [step == 0 for step in spec.strides] == [step == 0 for step in mask_spec(mask).strides]


def test_gradients_are_those_of_the_callers_mask(
    any_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, "90")
    inputs = [x.requires_grad_() for x in (*qkv(), mask_of("1hqk", HALF, 1))]

    def ours(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return flashcore.attention(q, k, v, mask=mask, backend="sim")

    def exact(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return flashcore.attention(q, k, v, mask=mask)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    for own, want in zip(gradients(ours, *inputs), gradients(exact, *wide), strict=True):
        torch.testing.assert_close(own.double(), want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("backend", ["auto", "sm90"])
def test_each_launch_is_told_where_its_copy_is(
    any_size: None, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Also one whose call was met before, with a mask that holds something else by now."""
    machine = standin.install(monkeypatch)
    q, k, v = qkv()
    mask = mask_of("b1qk", BOOL)
    seen = []

    def look(params: Any) -> None:
        memory = ctypes.string_at(params.attn.mask, mask[:, 0].numel() // KEYS * 48)
        rows = torch.frombuffer(bytearray(memory), dtype=BOOL).view(2, 1, ROWS, 48)
        seen.append((params.attn.mask, rows[..., :KEYS].clone()))

    machine.driver.on_params = look
    for _ in range(3):
        mask = mask.clone() if len(seen) == 2 else mask.logical_not_()
        flashcore.attention(q, k, v, mask=mask, backend=backend)
        address, rows = seen[-1]
        assert address % 16 == 0
        assert address != mask.data_ptr()
        assert torch.equal(rows, mask)
    aligned = torch.ones(2, 1, ROWS, 48, dtype=BOOL)[..., :KEYS]
    machine.driver.on_params = lambda params: seen.append((params.attn.mask, aligned))
    flashcore.attention(q, k, v, mask=aligned, backend=backend)
    assert seen[-1][0] == aligned.data_ptr()


def test_which_masks_are_copied() -> None:
    assert names_of(of_sizes("b1qk")) == ["mask"]
    assert names_of(of_sizes("qk")) == ["mask"]
    assert names_of(of_sizes("b1qk", heads=8)) == ["mask"]
    assert names_of(of_sizes("b1qk", heads=7)) == []  # too few share it
    assert names_of(of_sizes("1hqk")) == []
    assert names_of(of_sizes("bhqk")) == []
    assert names_of(of_sizes("b11k")) == []  # a row for all is read once
    assert names_of(of_sizes("b1qk", rows=128)) == []  # the call is small
    assert names_of(of_sizes("b1qk", keys=1992)) == ["mask"]  # aligned to 8 bytes
    assert names_of(of_sizes("b1qk", keys=2048)) == []
    assert names_of(of_sizes("b1q1")) == []
    assert names_of(of_sizes("b1qk"), "wmma") == []
    assert names_of(of_sizes("b1qk", batch_invariant=True)) == []
    assert names_of(of_sizes("b1qk", causal=True)) == []
    assert names_of(of_sizes("b1qk", window=(100, -1))) == []
    assert names_of(of_sizes("b11k", heads=8192, rows=1)) == []
    q, k = (torch.empty(2, 16, seqlen, 64, dtype=HALF) for seqlen in (1024, 1999))
    transposed = torch.empty(2, 1, 1999, 1024, dtype=BOOL).mT
    assert names_of(on_hopper(q, k, k, transposed)) == []
    wide = (torch.empty(2, 16, seqlen, 136, dtype=HALF) for seqlen in (1024, 1999, 1999))
    assert names_of(on_hopper(*wide, torch.empty(2, 1, 1024, 1999, dtype=BOOL))) == []
    floats = torch.empty(2, 1, 1024, 1999)
    assert names_of(on_hopper(q[:, :4], k[:, :4], k[:, :4], floats)) == []  # small
    long = torch.empty(2, 4, 4096, 64, dtype=HALF)
    floats = torch.empty(2, 1, 4096, 1999)
    assert names_of(on_hopper(long, k[:, :4], k[:, :4], floats)) == ["mask"]  # 4 bytes: 4 heads
    problem = of_sizes("b1qk")
    assert problem.mask is not None
    padded = dataclasses.replace(problem, varlen="keys")
    assert names_of(padded) == []
    assert copy_of_mask(padded, forward=False) is not None
    assert copy_of_mask(of_sizes("1hqk", causal=True), forward=False) is not None
    tree = dataclasses.replace(problem.mask, dtype="tree")
    assert names_of(dataclasses.replace(problem, mask=tree)) == []


def test_a_copy_is_broadcast_as_the_mask_is() -> None:
    """Whatever is broadcast is written once."""
    for dims, strides, num_rows in (
        ("b1qk", (1024 * 2000, 0, 2000, 1), 2 * 1024),
        ("qk", (0, 0, 2000, 1), 1024),
    ):
        of_bytes = [2000 // 16 * 16 if stride == 2000 else stride for stride in strides]
        adapted = adapt(of_sizes(dims, keys=1993), "sm90")
        assert adapted.problem.mask == MaskSpec("bool", tuple(of_bytes), 16)
        assert adapted.copies[0].num_bytes == num_rows * 2000


def test_a_copied_mask_is_no_reason_for_the_portable_kernel() -> None:
    hopper = forward_for(90)
    problem = of_sizes("b1qk")
    assert rather_portable(problem, hopper) is None
    # Padded for either kernel; and for its bytes there is little to compute.
    q, k = (torch.empty(2, 4, seqlen, 12, dtype=HALF) for seqlen in (4096, 1999))
    problem = on_hopper(q, k, k, torch.empty(2, 1, 4096, 1999))
    assert names_of(problem) == ["q", "k", "v", "mask"]
    assert rather_portable(problem, hopper) is None
    assert kernel_for(problem, 90) == "sm90"


def test_explain_says_that_a_mask_is_copied() -> None:
    q, k = (torch.empty(2, 16, seqlen, 64, dtype=HALF) for seqlen in (1024, 1999))

    def text_of(mask: torch.Tensor, **options: Any) -> str:
        return str(flashcore.explain(q, k, k, mask=mask, file=io.StringIO(), **options))

    shared = torch.ones(2, 1, 1024, 1999, dtype=BOOL)
    text = text_of(shared, arch=90)
    assert "mask is copied: it is broadcast" in text
    assert "at multiples of 1" in text
    assert "bytes only" not in text
    assert "is copied" not in text_of(shared, arch=80)
    own = torch.empty(2, 16, 1024, 1999, dtype=BOOL)
    assert "is copied" not in text_of(own, arch=90)
    assert "aligned to 1 bytes only" in text_of(own, arch=90)


@pytest.mark.parametrize("backend", [GPU])
def test_a_graph_copies_the_mask_anew(any_size: None, backend: str) -> None:
    q, k, v = qkv(device_of(backend), 64)
    mask = mask_of("b1qk", HALF, 1, device_of(backend))
    check(backend, q, k, v, mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcore.attention(q, k, v, mask=mask)
    mask.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert error_report(out, q, k, v, mask=mask).ok
