"""Test attention on what real models feed it: MiniLM's first layer, three sentences, padding
masked; and gradients in the last layer of the GPT that an example trains.

Random inputs have scores of a few units; here they reach from -98 to 56, and 43 % of the keys are
padding that holds plausible values, so that a mask that is off by one shows.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gradient_rule import wrong_gradients

import flashcore
from flashcore.checks.accuracy import error_report
from flashcore.data import CapturedAttention, load_minilm


@pytest.fixture(scope="module")
def captured() -> CapturedAttention:
    return load_minilm()


def part(captured: CapturedAttention, backend: str) -> CapturedAttention:
    """Return the whole batch; for the simulator two sentences (one padded) and two heads."""
    if backend != "sim":
        return captured
    q, k, v = (x[:2, 4:6] for x in (captured.q, captured.k, captured.v))
    return dataclasses.replace(captured, q=q, k=k, v=v, mask=captured.mask[:2])


def check(x: CapturedAttention, backend: str) -> None:
    out, lse = flashcore.attention(
        x.q, x.k, x.v, mask=x.mask, scale=x.scale, backend=backend, return_lse=True
    )
    report = error_report(out, x.q, x.k, x.v, lse=lse, mask=x.mask, scale=x.scale)
    assert report.ok, str(report)


def test_file_holds_what_it_says(captured: CapturedAttention) -> None:
    batch, heads, seqlen, head_dim = captured.q.shape
    assert (batch, heads, head_dim) == (len(captured.sentences), 12, 32)
    assert captured.q.dtype == captured.k.dtype == captured.v.dtype == torch.float16
    assert captured.mask.shape == (batch, 1, 1, seqlen)
    assert captured.mask.dtype == torch.bool
    assert captured.scale == pytest.approx(head_dim**-0.5)
    assert captured.lengths == sorted(captured.lengths, reverse=True)
    assert captured.lengths[0] == seqlen
    for tensor in (captured.q, captured.k, captured.v):
        assert tensor.isfinite().all()
        assert tensor[-1, :, -1].abs().max() > 0.1, "padding holds what the model computed there"


def test_words_attend_to_words_as_in_the_model(captured: CapturedAttention) -> None:
    """Tensors swapped or paired wrongly would not give these scores and these weights."""
    scores = captured.q.float() @ captured.k.float().transpose(-1, -2) * captured.scale
    assert scores.min() < -90
    assert scores.max() > 50
    weights = scores.masked_fill(~captured.mask, -torch.inf).softmax(-1)[0]  # no padding in it
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean(-1)
    assert entropy.max() > 2.5, "some head looks around broadly"
    assert entropy.min() < 1.5, "and some head looks at few words"


@pytest.mark.parametrize("backend", ["auto", "torch", "sim"])
def test_agrees_with_the_oracle_on_the_cpu(captured: CapturedAttention, backend: str) -> None:
    check(part(captured, backend), backend)


@pytest.mark.parametrize("backend", ["torch", "sim"])
def test_padding_is_not_heard(captured: CapturedAttention, backend: str) -> None:
    """Other values at the padded keys leave every bit of the output as it was."""
    x = part(captured, backend)
    out = flashcore.attention(x.q, x.k, x.v, mask=x.mask, backend=backend)
    padded = ~x.mask.transpose(-1, -2)
    k, v = (y.masked_fill(padded, 1000.0) for y in (x.k, x.v))
    assert torch.equal(flashcore.attention(x.q, k, v, mask=x.mask, backend=backend), out)
    assert not torch.equal(flashcore.attention(x.q, k, v, backend=backend), out)


def check_gradients(x: CapturedAttention, backend: str, dtype: torch.dtype) -> None:
    """Judge gradients of words, as a loss over them has it: 0 arrives at padding."""
    leaves = [y.to(dtype).requires_grad_() for y in (x.q, x.k, x.v)]
    out = flashcore.attention(*leaves, mask=x.mask, scale=x.scale, backend=backend)
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(out.shape, generator=generator).to(out)
    dout = dout.masked_fill(~x.mask.transpose(-1, -2), 0.0)
    found = torch.autograd.grad(out, leaves, dout)
    given = [y.detach() for y in leaves]
    wrong = wrong_gradients(found, *given, x.mask, dout, None, {"scale": x.scale}, out.detach())
    assert not wrong, str(wrong)


@pytest.mark.parametrize("backend", ["auto", "sim"])
def test_gradients_keep_to_the_rule_on_the_cpu(
    captured: CapturedAttention, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the simulator by the fused kernels for Hopper."""
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    check_gradients(part(captured, backend), backend, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_keep_to_the_rule_on_the_gpu(
    captured: CapturedAttention, dtype: torch.dtype
) -> None:
    q, k, v, mask = (x.cuda() for x in (captured.q, captured.k, captured.v, captured.mask))
    on_gpu = dataclasses.replace(captured, q=q, k=k, v=v, mask=mask)
    check_gradients(on_gpu, "auto", dtype)


@pytest.fixture(scope="module")
def trained() -> tuple[torch.Tensor, ...]:
    """Return q, k, v, and what arrives at out, in the last layer of a GPT that is trained."""
    path = Path(__file__).resolve().parents[2] / "examples" / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("gpt_in_training", path)
    assert spec is not None
    assert spec.loader is not None
    gpt = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = gpt
    spec.loader.exec_module(gpt)
    seen: list[tuple[torch.Tensor, ...]] = []

    def attention(*qkv: torch.Tensor, **options: Any) -> torch.Tensor:
        out = flashcore.attention(*qkv, **options)
        if out.requires_grad:
            given = tuple(x.detach() for x in qkv)
            out.register_hook(lambda dout: seen.append((*given, dout.detach())))
        return out

    gpt.flashcore = SimpleNamespace(attention=attention)  # type: ignore[attr-defined]
    sizes = ["--width", "64", "--layers", "2", "--heads", "2", "--context", "150", "--batch", "2"]
    gpt.main(["--device", "cpu", "--steps", "20", *sizes])
    return seen[-2]  # gradients arrive at the last layer first


def check_trained(trained: tuple[torch.Tensor, ...], dtype: torch.dtype, backend: str) -> None:
    q, k, v, dout = trained
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    dout = (dout / dout.abs().max()).to(dtype)  # of a mean over letters: float16 has no such values
    out = flashcore.attention(*leaves, causal=True, backend=backend)
    found = torch.autograd.grad(out, leaves, dout)
    given = [x.detach() for x in leaves]
    wrong = wrong_gradients(found, *given, None, dout, None, {"causal": True}, out.detach())
    assert not wrong, str(wrong)


@pytest.mark.parametrize("backend", ["auto", "sim"])
def test_a_layer_in_training_keeps_to_the_rule_on_the_cpu(
    trained: tuple[torch.Tensor, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHCORE_SIM_ARCH", "90")
    assert trained[0].shape == (2, 2, 150, 32)
    check_trained(trained, torch.bfloat16, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_training_keeps_to_the_rule_on_the_gpu(
    trained: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> None:
    check_trained(tuple(x.cuda() for x in trained), dtype, "auto")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "wmma", "torch"])
def test_agrees_with_the_oracle_on_the_gpu(captured: CapturedAttention, backend: str) -> None:
    q, k, v, mask = (x.cuda() for x in (captured.q, captured.k, captured.v, captured.mask))
    check(dataclasses.replace(captured, q=q, k=k, v=v, mask=mask), backend)
