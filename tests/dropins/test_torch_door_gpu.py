"""aten's flash operators on flashcore on a GPU: everybody's own functions, unmodified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from door_inputs import by_varlen_attn, check, check_packed, packed, randn
from gradient_rule import wrong_gradients
from torch import Tensor

import flashcore
import flashcore.integrations.torch as door
from flashcore.dropins import aten_fallback, aten_flash

attention_module = pytest.importorskip("torch.nn.attention")
if not hasattr(attention_module, "register_flash_attention_impl"):
    pytest.skip("this torch has no door for flash attention", allow_module_level=True)


@pytest.fixture(autouse=True)
def _torchs_own_again() -> Iterator[None]:
    aten_fallback._warned.clear()
    yield
    assert attention_module.current_flash_attention_impl() is None


def refuse_nested_call(*_: Any, **__: Any) -> None:
    raise AssertionError("the operator was called, not its own kernel")


@pytest.fixture
def _runs_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own forward kernels must not run."""
    monkeypatch.setattr(aten_flash, "by_torch", refuse_nested_call)


@pytest.mark.gpu
@pytest.mark.usefixtures("_runs_ours")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_sdpa_on_a_gpu(transposed: bool, causal: bool, compiled: bool) -> None:
    shape = (2, 130, 4, 64) if transposed else (2, 4, 130, 64)
    x = [randn(*shape, seed=seed, device="cuda") for seed in range(4)]
    q, k, v, dout = (t.transpose(1, 2) for t in x) if transposed else x
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    if compiled:
        torch.compiler.reset()
    with door.activate():
        out = (torch.compile(f, fullgraph=True) if compiled else f)(*leaves)
        gradients = torch.autograd.grad(out, leaves, dout)
    q, k, v = (t.detach() for t in leaves)
    check(out.detach(), None, q, k, v, causal=causal)
    assert wrong_gradients(gradients, q, k, v, None, dout, None, {"causal": causal}) == []


@pytest.mark.gpu
def test_sdpa_comes_here_and_goes_back_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(1, 2, 128, 64, seed=seed, device="cuda") for seed in range(3))
    want = F.scaled_dot_product_attention(q, k, v)
    calls = []
    attend = aten_flash.attend

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return attend(*arguments)

    monkeypatch.setattr(aten_flash, "attend", spy)
    order = torch._C._get_sdp_priority_order()
    with door.activate():
        F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 1
    assert torch._C._get_sdp_priority_order() == order
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), want)
    with door.activate(prefer=False):
        assert torch._C._get_sdp_priority_order() == order
        with attention_module.sdpa_kernel(attention_module.SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("_runs_ours")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 0)])
def test_varlen_attn_on_a_gpu(window: tuple[int, int], compiled: bool) -> None:
    x, cu, ends = packed("cuda")
    x[1:3] = (t.repeat_interleave(2, 1) for t in x[1:3])
    with door.activate():
        out, lse, gradients = by_varlen_attn(x, cu, window, "inductor" if compiled else None)
    check_packed(out, gradients, lse, x, ends, window=window)


@pytest.mark.gpu
def test_dropout_is_torchs_on_a_gpu() -> None:
    """Forward and backward: the gradient belongs to the weights that were dropped."""
    q, k, v, dout = (randn(1, 2, 128, 64, seed=s, device="cuda") for s in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        with attention_module.sdpa_kernel(attention_module.SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves, dropout_p=0.3)
            return out, *torch.autograd.grad(out, leaves, dout)

    want = run()
    with door.activate(), pytest.warns(flashcore.FallbackWarning, match=r"dropout_p=0\.3"):
        have = run()
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)  # its dq is summed in any order


@pytest.mark.gpu
def test_flashcores_fallback_to_flash_attention_2_ends_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With our fused backward out of the way, torch's serves, and not through the door."""
    from flashcore.backends import gradients

    monkeypatch.setattr(gradients, "_obstacle_to_ours", lambda *_: "not today")
    q, k, v, dout = (randn(1, 2, 128, 64, seed=s, device="cuda") for s in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with door.activate():
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        have = torch.autograd.grad(out, leaves, dout)
    q, k, v = (t.detach() for t in leaves)
    assert wrong_gradients(have, q, k, v, None, dout, None, {"causal": True}) == []


@pytest.mark.gpu
def test_a_cuda_graph_of_forward_and_backward() -> None:
    leaves = [randn(1, 2, 128, 64, seed=s, device="cuda").requires_grad_() for s in range(3)]
    dout = randn(1, 2, 128, 64, seed=3, device="cuda")

    def run() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return out, *torch.autograd.grad(out, leaves, dout)

    with door.activate():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            want = run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            have = run()
    graph.replay()
    for x, y in zip(have, want, strict=True):
        assert torch.equal(x, y)
