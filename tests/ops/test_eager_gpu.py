"""Test the eager call on a GPU: streams, graphs, threads, devices. test_eager.py needs none."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

import flashcore
from flashcore.checks.accuracy import error_report
from flashcore.errors import BackendUnavailableError
from flashcore.launch import descriptors, launcher
from flashcore.launch.launcher.build import load
from flashcore.ops import calls
from flashcore.ops import dense as ops

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["python", "compiled"])
def launched_by(request):
    """Run every test here with both launchers."""
    try:
        with launcher.using(request.param):
            yield request.param
    except BackendUnavailableError as error:
        pytest.skip(f"no launcher: {error}")


def qkv(seqlen=256, heads=4, dim=64, device="cuda", seed=0, dtype=torch.float16):
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(
        torch.randn(1, heads, seqlen, dim, generator=generator, device=device, dtype=dtype)
        for _ in range(3)
    )


def through_the_operator(q, k, v, return_lse=False, backend="auto", **options):
    checked = ops.Options.checked(options.get("causal", False), None, None, None)
    wanted = *ops.Wanted(True), backend
    out, lse, _ = ops.forward(q, k, v, options.get("mask"), None, *checked, *wanted)
    return (out, lse) if return_lse else out


@pytest.mark.parametrize("backend", ["auto", "wmma"])
@pytest.mark.parametrize(
    "layout", ["contiguous", "bshd", "offset", "misaligned", "expanded", "sliced"]
)
def test_layouts(backend, layout):
    """The same bits as the operator's, on a first call and on a second with other addresses."""
    for seed in (0, 1):
        q, k, v = qkv(seed=seed)
        if layout == "bshd":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        elif layout in ("offset", "misaligned"):
            step = 8 if layout == "offset" else 1
            q, k, v = (
                x.new_zeros(x.numel() + step)[step:].view(x.shape).copy_(x) for x in (q, k, v)
            )
        elif layout == "expanded":
            k, v = (x[:, :1].expand(-1, 4, -1, -1) for x in (k, v))
        elif layout == "sliced":
            q, k, v = (x[:, :, 3:200] for x in (q, k, v))
        for causal in (False, True):
            got = flashcore.attention(q, k, v, causal=causal, backend=backend)
            want = through_the_operator(q, k, v, causal=causal, backend=backend)
            assert torch.equal(got, want)
            assert error_report(got, q, k, v, causal=causal).ok


def test_a_second_stream():
    """The launch goes to the current stream: what was enqueued before it there is done first."""
    q, k, v = qkv(2048)
    want = flashcore.attention(q, k, v)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.zeros_like(q)
        for _ in range(50):
            late.add_(0.0)
        late.copy_(q)
        got = flashcore.attention(late, k, v)
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_graph_captures_and_replays(recorded):
    """After one warm call: no synchronisation, and no memory but torch's own. CUDA refuses a
    synchronisation and cudaMalloc to a thread that captures; torch's allocator has leave, for the
    graph's own pool, and that is to hold out (and lse) alone."""
    q, k, v = (x.requires_grad_(recorded) for x in qkv())
    static = q.detach().clone().requires_grad_(recorded)
    flashcore.attention(static, k, v, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        allocated = torch.cuda.memory_allocated()
        out = flashcore.attention(static, k, v, causal=True)
        taken = torch.cuda.memory_allocated() - allocated
    rows = out.numel() // out.shape[-1]
    assert taken <= out.numel() * out.element_size() + recorded * 4 * rows + 1024
    for seed in (1, 2):
        fresh = qkv(seed=seed)[0]
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, flashcore.attention(fresh, k, v, causal=True))


def test_the_launcher_that_is_asked_for_launches(launched_by):
    q, k, v = qkv()
    for _ in range(3):
        flashcore.attention(q, k, v)
    if launched_by == "compiled":
        assert load().counts() == (1, 3)


@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_are_those_of_the_operator(return_lse):
    results = []
    for attention in (flashcore.attention, through_the_operator):
        q, k, v = (x.requires_grad_() for x in qkv())
        outputs = attention(q, k, v, causal=True, return_lse=return_lse)
        outputs = outputs if return_lse else (outputs,)
        loss = sum(x.float().square().sum() for x in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, (q, k, v))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_nothing_waits_for_the_gpu():
    q, k, v = qkv()
    flashcore.attention(q, k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flashcore.attention(q, k, v)
        flashcore.attention(q, k, v, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_that_never_used_the_gpu():
    """Each binds a context for itself, and gets its own result."""
    sets = [qkv(seed=i) for i in range(8)]
    wanted = [flashcore.attention(*tensors) for tensors in sets]
    torch.cuda.synchronize()
    results = [[] for _ in sets]
    start = threading.Barrier(len(sets))

    def work(i):
        start.wait()
        for _ in range(50):
            results[i].append(flashcore.attention(*sets[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for want, got in zip(wanted, results, strict=True):
        assert len(got) == 50
        assert all(torch.equal(x, want) for x in got)


def test_compiled_and_replayed():
    """torch.compile(mode="reduce-overhead") puts the operator into a CUDA graph of its own."""
    q, k, v = qkv()
    fast = torch.compile(
        lambda q, k, v: flashcore.attention(q * 2, k, v), fullgraph=True, mode="reduce-overhead"
    )
    for _ in range(3):
        got = fast(q, k, v).clone()
    assert torch.equal(got, flashcore.attention(q * 2, k, v))


def test_a_slow_call_and_a_fast_one_agree(monkeypatch):
    q, k, v = qkv()
    fast = [flashcore.attention(q, k, v) for _ in range(2)][1]
    monkeypatch.setattr(calls, "_calls", {})
    assert torch.equal(flashcore.attention(q, k, v), fast)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_tensors_device_need_not_be_current():
    q, k, v = qkv(device="cuda:1")
    assert torch.cuda.current_device() == 0
    out = flashcore.attention(q, k, v)
    assert torch.cuda.current_device() == 0
    assert out.device == q.device
    assert error_report(out, q, k, v).ok
    with pytest.raises(ValueError, match="k is on cuda:0 but q is on cuda:1"):
        flashcore.attention(q, torch.zeros_like(k, device="cuda:0"), v)
    on_first = flashcore.attention(*(x.cpu().to("cuda:0") for x in (q, k, v)))
    assert torch.equal(on_first.cpu(), out.cpu())


def test_a_descriptor_with_another_address_is_the_one_of_that_tensor():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an sm_90 GPU")
    first, second = torch.zeros(2, 1, 4, 100, 64, dtype=torch.float16, device="cuda")
    kind = (128, 128 * 100, 128 * 400, 64, 100, 4, 1, 64, 64, 2, 128)
    encoded = [
        bytes(descriptors.encode(descriptors.TensorMap(x.data_ptr(), *kind), "float16"))
        for x in (first, second)
    ]
    assert encoded[0] != encoded[1]
    memory, address = descriptors.aligned(encoded[0])
    descriptors.readdress(address, [(0, second.data_ptr())])
    begin = address - ctypes.addressof(memory)
    assert bytes(memory)[begin : begin + len(encoded[1])] == encoded[1]
