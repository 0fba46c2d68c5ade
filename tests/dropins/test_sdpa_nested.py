"""Test jagged nested tensors through scaled_dot_product_attention: each sequence as if alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import flashcore
from flashcore import FallbackWarning
from flashcore.dropins.sdpa import attention as sdpa
from flashcore.dropins.sdpa.attention import Call, route

LENGTHS = (3, 7, 1)


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch):
    monkeypatch.setattr(sdpa, "_warned", set())


def sequences(heads, lengths=LENGTHS, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, 16, generator=generator).to(**kwargs) for n in lengths]


def nested(parts):
    """Return a nested tensor [batch, num_heads, jagged, head_dim]."""
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def like(parts, other):
    """Return a nested tensor with the very lengths of `other`, as projections of one input have."""
    values = torch.cat(parts)
    return torch.nested.nested_tensor_from_jagged(values, other.offsets()).transpose(1, 2)


def on(backend, q, k, v, mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
    return route(Call(q, k, v, mask, dropout_p, is_causal, None, enable_gqa), backend)


def check(backend, device, dtype, bound, is_causal, gqa):
    q_parts = sequences(4, device=device, dtype=dtype)
    k_parts, v_parts = (
        sequences(2 if gqa else 4, seed=i, device=device, dtype=dtype) for i in (1, 2)
    )
    q = nested(q_parts)
    k, v = like(k_parts, q), like(v_parts, q)
    out = on(backend, q, k, v, is_causal=is_causal, enable_gqa=gqa)
    assert out.shape == q.shape
    for part, *qkv in zip(out.unbind(), q_parts, k_parts, v_parts, strict=True):
        alone = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None].double() for x in qkv), is_causal=is_causal, enable_gqa=gqa
        )
        torch.testing.assert_close(part.double(), alone[0], atol=bound, rtol=bound)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")
def test_each_sequence_is_as_if_alone(is_causal, gqa):
    check("torch", "cpu", torch.float64, 1e-9, is_causal, gqa)
    check("sim", "cpu", torch.float16, 2e-3, is_causal, gqa)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.filterwarnings("error::flashcore.FallbackWarning")
def test_on_the_gpu(is_causal, gqa):
    check("auto", "cuda", torch.float16, 2e-3, is_causal, gqa)


def test_gradients_and_the_lengths_that_come_back():
    gradients = []
    for function in (lambda *x: on("torch", *x), F.scaled_dot_product_attention):
        values = torch.cat(sequences(4, dtype=torch.float64)).requires_grad_()
        offsets = torch.tensor([0, 3, 10, 11])
        x = torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)
        out = function(x, x, x)
        (out + x).values().square().sum().backward()  # adds only if the lengths are the same object
        gradients.append(values.grad)
    torch.testing.assert_close(*gradients)


def test_the_rest_is_torchs():
    q = nested(sequences(4, dtype=torch.float32))
    expected = F.scaled_dot_product_attention(q, q, q)
    with pytest.warns(FallbackWarning, match="float32"):
        ours = on("sim", q, q, q)
    assert torch.equal(ours.values(), expected.values())
    assert torch.equal(flashcore.scaled_dot_product_attention(q, q, q).values(), expected.values())
    with flashcore.enable():
        assert torch.equal(F.scaled_dot_product_attention(q, q, q).values(), expected.values())
    other = nested(sequences(4, (2, 2, 9), dtype=torch.float16))
    q = nested(sequences(4, dtype=torch.float16))
    cross = on("sim", q, other, other)
    assert cross.shape == q.shape
