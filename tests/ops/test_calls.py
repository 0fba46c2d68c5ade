"""Test what tells calls apart that share a key, and memory for results: with torch's private parts,
and without them."""

from __future__ import annotations

import pytest
import torch
from op_inputs import qkv

import flashcore
from flashcore.launch import allocation
from flashcore.ops import calls

HALF = torch.float16


def vary_in_what_no_key_holds():
    """Yield calls of one key, each with q, k and v of its own kind."""
    q, k, v = (torch.zeros(2, 2, 6, 8, dtype=HALF) for _ in range(3))
    wide = torch.zeros(2, 2, 6, 16, dtype=HALF)
    negated = torch._neg_view(q)
    return {
        "as they are": (q, k, v),
        "v has another head_dim": (q, k, wide),
        "q has other strides": (wide[..., :8], k, v),
        "v has other strides": (q, k, wide[..., :8]),
        "another dtype": (q.bfloat16(), k.bfloat16(), v.bfloat16()),
        "k has another dtype": (q, k.bfloat16(), v),
        "v is negated": (q, k, negated),
        "q is a parameter": (torch.nn.Parameter(q, requires_grad=False), k, v),
    }


@pytest.mark.parametrize("how", ["by torch's guards", "without them"])
@pytest.mark.parametrize("name", vary_in_what_no_key_holds())
def test_what_fits_a_guard_and_what_does_not(monkeypatch, how, name):
    if how == "without them":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    kinds = vary_in_what_no_key_holds()
    fits = calls.guard(*kinds[name])
    assert type(fits).__name__ == ("function" if how == "without them" else type("".join).__name__)
    assert [other for other, tensors in kinds.items() if fits(*tensors)] == [name]


def test_a_guard_tells_devices_apart_and_takes_anything():
    q, k, v = torch.zeros(3, 1, 1, 4, 8)
    for fits in (calls.guard(q, k, v), calls.guard(q, k, k)):  # torch's want no tensor twice
        assert fits(q, k, v) or fits(q, k, k)
        assert not fits(q, k, v.to("meta"))
        assert not fits(q, k, "no tensor")


def test_one_tensor_for_all(monkeypatch):
    monkeypatch.setattr(calls, "_calls", {})
    q, k, v = qkv(6, 6)
    for tensors in ((q, k, v), (q, q, q), (q, k, k), (q, k, v), (q, q, q)):
        want = flashcore.attention(*(x.clone() for x in tensors))
        torch.testing.assert_close(flashcore.attention(*tensors), want, rtol=0, atol=0)


@pytest.mark.parametrize("fast", [True, False])
def test_memory_for_results(monkeypatch, fast):
    """Contiguous, and an ordinary tensor, inference mode or not."""
    if not fast:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    for shape in ((2, 3, 5, 8), (1, 1, 1, 8), (2, 3, 5)):
        new = allocation.allocator(torch.device("cpu"), shape, torch.bfloat16)
        x, y = new(), new()
        assert (x.shape, x.dtype, x.device.type) == (shape, torch.bfloat16, "cpu")
        assert x.stride() == torch.empty(shape).stride()
        assert x.data_ptr() != y.data_ptr()
        assert not x.requires_grad
        with torch.inference_mode():
            assert new().is_inference()
