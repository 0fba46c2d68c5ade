"""Test CUDA graphs of calls whose blocks draw work from counters: by torch.compile and by hand,
after a warm call and without one, several in turn and side by side."""

from __future__ import annotations

import pytest
import torch

import flashcore
from flashcore.backends import dispatch
from flashcore.launch import counters, driver_launch, launcher
from flashcore.launch import kernel_call as launch
from flashcore.ops import calls

pytestmark = pytest.mark.gpu

HALF = torch.float16


def randn(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=HALF)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def dense():
    """Run calls whose persistent blocks draw row tiles."""
    return lambda q: flashcore.attention(q, q, q, causal=True)


def decode():
    """Run calls whose blocks share the keys of a row tile, and count who is last."""
    keys = randn(1, 2, 8192, 64, seed=1)
    return lambda q: flashcore.attention(q[:, :, :1], keys, keys)


def padded():
    ends = lengths(900)
    return lambda q: flashcore.attention(q, q, q, causal=True, seqlens_k=ends)


def packed():
    ends = lengths(0, 700, 1024)

    def call(q):
        rows = q[0].transpose(0, 1)
        return flashcore.attention_varlen(rows, rows, rows, ends, ends, 700, 700, causal=True)

    return call


CALLS = [dense, decode, padded, packed]


@pytest.fixture(params=["python", "compiled"], autouse=True)
def launched_by(request):
    try:
        with launcher.using(request.param):
            yield
    except flashcore.BackendUnavailableError as error:
        pytest.skip(f"no launcher: {error}")


@pytest.fixture
def cold(monkeypatch):
    """Start cold: nothing is prepared, no kernel is loaded, and there is no counter yet."""
    torch._dynamo.reset()
    monkeypatch.setattr(calls, "_calls", {})
    monkeypatch.setattr(calls, "_growing", {})
    monkeypatch.setattr(launch, "_arguments", {})
    for name in ("_free", "_of_streams", "_of_captures"):
        monkeypatch.setattr(counters, name, {})
    for function in (dispatch.kernel_call, launch._launch, driver_launch._load):
        function.cache_clear()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_reduce_overhead(cold, call, warm):
    call = call()
    if warm:
        call(randn(1, 8, 1024, 64))
    fast = torch.compile(lambda q: call(q * 2) + 1, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        q = randn(1, 8, 1024, 64, seed=seed)
        got = fast(q).clone()
        torch.testing.assert_close(got, call(q * 2) + 1, rtol=1e-3, atol=1e-3)


def test_reduce_overhead_of_several_graphs_in_turn(cold):
    """Several functions and lengths take turns, each with its own graph, in one pool."""

    def compiled(call):
        return torch.compile(lambda q: call(q * 2), mode="reduce-overhead")

    functions = [compiled(call()) for call in CALLS]
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for call, fast in zip(CALLS, functions, strict=True):
            q = randn(1, 8, 1024, 64, seed=seed)
            got = fast(q).clone()
            torch.testing.assert_close(got, call()(q * 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_graph_by_hand(cold, call, warm):
    """Without a warm call kernels are compiled and loaded, and counters made, during the capture,
    which counts for all threads."""
    call, static = call(), randn(1, 8, 1024, 64)
    if warm:
        call(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        out = call(static)
    for seed in range(3):
        static.copy_(randn(1, 8, 1024, 64, seed=seed))
        graph.replay()
        torch.testing.assert_close(out, call(static), rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_graphs_side_by_side_share_no_counter(cold, call):
    """Captured one after the other on one stream, replayed at once on two."""
    call = call()
    inputs = [randn(1, 8, 1024, 64, seed=seed) for seed in range(2)]
    graphs, outs, streams = [], [], [torch.cuda.Stream() for _ in inputs]
    for q in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([call(q) for _ in range(20)])
        graphs.append(graph)
    want = [call(q) for q in inputs]
    torch.cuda.synchronize()
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for results, expected in zip(outs, want, strict=True):
        assert all(torch.equal(out, expected) for out in results)
