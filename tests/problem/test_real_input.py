"""Test attention on what a real model feeds it: MiniLM's first layer, three sentences, padding
masked.

Random inputs have scores of a few units; here they reach from -98 to 56, and 43 % of the keys are
padding that holds plausible values, so that a mask that is off by one shows.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "wmma", "torch"])
def test_agrees_with_the_oracle_on_the_gpu(captured: CapturedAttention, backend: str) -> None:
    q, k, v, mask = (x.cuda() for x in (captured.q, captured.k, captured.v, captured.mask))
    check(dataclasses.replace(captured, q=q, k=k, v=v, mask=mask), backend)
