"""`with flashcore.enable()`: unmodified code runs on flashcore; afterwards all is as before."""

from __future__ import annotations

import subprocess
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F

import flashcore
from flashcore.dropins import routing
from flashcore.dropins.sdpa import attention as sdpa
from flashcore.dropins.sdpa.attention import torch_sdpa

HALF = torch.float16


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(HALF)


@pytest.fixture
def seen(monkeypatch):
    """Return the shapes of q that reached flashcore.attention, and on which backend."""
    calls = []
    attention = sdpa.attention

    def spy(q, k, v, **options):
        calls.append((tuple(q.shape), options["backend"]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(sdpa, "known", lambda *arguments: None)
    monkeypatch.setattr(routing, "known", lambda *arguments: None)
    monkeypatch.setattr(sdpa, "attention", spy)
    return calls


@pytest.fixture(autouse=True)
def _torch_is_back():
    yield
    assert F.scaled_dot_product_attention is torch_sdpa
    assert routing._active == []
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_name_is_flashcores_inside_and_torchs_outside(seen):
    q = randn(1, 2, 5, 16)
    with flashcore.enable():
        assert F.scaled_dot_product_attention is flashcore.scaled_dot_product_attention
    with flashcore.enable(backend="sim"):
        out = F.scaled_dot_product_attention(q, q, q)
    assert seen == [((1, 2, 5, 16), "sim")]
    torch.testing.assert_close(out, torch_sdpa(q, q, q), atol=2e-3, rtol=2e-3)


def test_flashcores_own_use_of_torch_is_not_routed(seen):
    """On the CPU `attention` may compute with torch's function, which enable() does not change."""
    q = randn(1, 2, 5, 16)
    with flashcore.enable(backend="sim"):
        out = flashcore.attention(q, q, q)
    assert seen == []
    assert torch.equal(out, torch_sdpa(q, q, q))


def test_as_a_decorator(seen):
    @flashcore.enable(backend="sim")
    def model(x):
        return F.scaled_dot_product_attention(x, x, x)

    model(randn(1, 1, 4, 8))
    model(randn(1, 1, 4, 8))
    assert len(seen) == 2


def test_an_exception_ends_it():
    with pytest.raises(KeyError), flashcore.enable():
        raise KeyError


def test_blocks_nest_and_the_last_one_decides(seen):
    q = randn(1, 1, 4, 8)
    with flashcore.enable():
        with flashcore.enable(backend="sim"):
            with flashcore.enable():
                assert F.scaled_dot_product_attention is flashcore.scaled_dot_product_attention
            F.scaled_dot_product_attention(q, q, q)
        assert len(seen) == 1
        assert F.scaled_dot_product_attention is flashcore.scaled_dot_product_attention


def test_blocks_of_two_threads_overlap():
    """The first to enter is the first to leave: the second is still enabled."""
    entered, left = threading.Event(), threading.Event()

    def first():
        with flashcore.enable(backend="sim"):
            entered.set()
            left.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(30)
    with flashcore.enable():
        left.set()
        thread.join(30)
        assert F.scaled_dot_product_attention is flashcore.scaled_dot_product_attention
        assert not torch.backends.mha.get_fastpath_enabled()


def test_every_thread_is_routed(seen):
    q = randn(1, 1, 4, 8)
    with flashcore.enable(backend="sim"):
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(q, q, q))
        thread.start()
        thread.join(60)
    assert len(seen) == 1


def test_modules_that_imported_the_function_by_name(monkeypatch, seen):
    theirs = types.ModuleType("their_model")
    exec(
        "from torch.nn.functional import scaled_dot_product_attention\n"
        "def model(x): return scaled_dot_product_attention(x, x, x)",
        vars(theirs),
    )
    monkeypatch.setitem(sys.modules, "their_model", theirs)
    with flashcore.enable(backend="sim"):
        theirs.model(randn(1, 1, 4, 8))
        late = types.ModuleType("imported_inside")
        exec("from torch.nn.functional import scaled_dot_product_attention", vars(late))
        monkeypatch.setitem(sys.modules, "imported_inside", late)
    assert len(seen) == 1
    assert theirs.scaled_dot_product_attention is torch_sdpa
    assert late.scaled_dot_product_attention is torch_sdpa
    assert torch._C._nn.scaled_dot_product_attention is torch_sdpa


def test_another_patch_is_put_back_and_left_alone():
    def somebodys(*args, **kwargs):
        return torch_sdpa(*args, **kwargs)

    try:
        F.scaled_dot_product_attention = somebodys
        with flashcore.enable():
            assert F.scaled_dot_product_attention is flashcore.scaled_dot_product_attention
        assert F.scaled_dot_product_attention is somebodys
        with flashcore.enable():
            F.scaled_dot_product_attention = somebodys
        assert F.scaled_dot_product_attention is somebodys
    finally:
        F.scaled_dot_product_attention = torch_sdpa


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_transformer_layers_attend_by_flashcore(train, padded, seen):
    """In eval mode their C++ fast path, which attends by itself, would be taken."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True).half()
    layer.train(train)
    x = randn(2, 7, 32)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = padded
    options = {"src_key_padding_mask": padding if padded else None}
    with torch.set_grad_enabled(train):
        with flashcore.enable(backend="sim"):
            ours = layer(x, **options)
        expected = layer(x, **options)
    assert seen == [((2, 4, 7, 8), "sim")]
    torch.testing.assert_close(ours[0], expected[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(ours[1, :4], expected[1, :4], atol=1e-2, rtol=1e-2)


def test_checkpointing_inside_the_block(seen):
    q = randn(1, 2, 5, 16).requires_grad_()
    with flashcore.enable(backend="sim"):
        out = torch.utils.checkpoint.checkpoint(
            lambda x: F.scaled_dot_product_attention(x, x, x), q, use_reentrant=False
        )
        out.sum().backward()
    assert len(seen) == 2
    assert q.grad is not None


def test_torch_compile_follows_the_block_both_ways():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def model(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    counter = torch._dynamo.utils.counters["stats"]
    x = randn(1, 2, 5, 16)
    expected = torch_sdpa(x, x, x, is_causal=True)
    graphs = []
    for enabled in (True, False, True):
        before = counter["unique_graphs"]
        if enabled:
            with flashcore.enable():
                out = model(x)
        else:
            out = model(x)
        graphs.append(counter["unique_graphs"] - before)
        assert torch.equal(out, expected)
    assert graphs == [1, 1, 0]  # one for each side, both kept


@pytest.mark.thorough
def test_the_compiler_is_not_imported_for_a_plain_call():
    """torch.nn.attention.bias imports torch._dynamo, which takes a second."""
    code = """
import sys, torch, flashcore
x = torch.randn(1, 2, 4, 8)
mask = torch.ones(4, 4, dtype=torch.bool)
for backend in ("auto", "sim"):
    with flashcore.enable(backend=backend):
        torch.nn.functional.scaled_dot_product_attention(x.half(), x.half(), x.half(), mask)
flashcore.scaled_dot_product_attention(x, x, x, is_causal=True)
flashcore.attention(x, x, x)
print(sorted({"torch.nn.attention.bias", "torch._dynamo"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", done.stdout


@pytest.mark.parametrize("backend", ["torch", "cuda", None])
def test_an_unknown_backend(backend):
    with pytest.raises(ValueError, match="cannot be enabled"), flashcore.enable(backend=backend):
        pass


@pytest.mark.gpu
def test_a_transformer_on_the_gpu():
    layer = torch.nn.TransformerEncoderLayer(256, 4, 512, batch_first=True).cuda().eval()
    x = torch.randn(3, 50, 256, device="cuda")
    with torch.inference_mode():
        exact = layer.double()(x.double())
        layer, x = layer.half(), x.half()
        torchs = layer(x)
        with flashcore.enable():
            ours = layer(x)
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-3
