"""Meta tensors: every public function gives shapes, dtypes and strides, and computes nothing."""

from __future__ import annotations

import pytest
import torch
from roads import ROADS, dense_inputs, packed_inputs, padded, varlen

import flashcore
from flashcore.backends.dispatch import BACKENDS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ROADS)
def test_results_and_gradients_look_like_those_of_real_tensors(name, dtype):
    road, inputs = ROADS[name]
    found = []
    for device in ("cpu", "meta"):
        tensors = inputs(dtype, device, requires_grad=True)
        out = road(*tensors)
        gradients = torch.autograd.grad(out.sum(), tensors)
        found.append([(x.shape, x.dtype, x.stride()) for x in (out, *gradients)])
        assert {x.device.type for x in (out, *gradients)} == {device}
        with torch.no_grad():
            assert road(*tensors).shape == out.shape
    if name in ("drop-in", "enabled"):  # torch's own there, with strides as it likes
        found = [[entry[:2] for entry in entries] for entries in found]
    assert found[0] == found[1]


@pytest.mark.parametrize("road", [flashcore.attention, padded, varlen])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_the_same_shapes(road, backend):
    tensors = (packed_inputs if road is varlen else dense_inputs)(torch.float16)
    want = [x.shape for x in road(*tensors, return_lse=True)]
    found = road(*(x.to("meta") for x in tensors), return_lse=True, backend=backend)
    assert [x.shape for x in found] == want
    assert [x.dtype for x in found] == [torch.float16, torch.float32]


def test_a_model_built_without_memory():
    """Under torch.device("meta"), in autocast, and in modules of torch with enable()."""
    with torch.device("meta"):
        layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        x = torch.randn(2, 5, 32)
        q = torch.randn(2, 4, 6, 8)
        with flashcore.enable(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).shape == x.shape
            layer(x).sum().backward()
            assert flashcore.attention(q, q, q).shape == q.shape
            assert flashcore.scaled_dot_product_attention(q, q, q).shape == q.shape
    with flashcore.enable():
        assert layer(x).shape == x.shape
        assert layer.eval()(x).shape == x.shape


def test_masks_transforms_and_second_derivatives():
    q, k, v = (x.to("meta").requires_grad_() for x in dense_inputs(torch.float32))
    mask = torch.empty(5, 7, device="meta", requires_grad=True)
    out = flashcore.attention(q, k, v, mask=mask)
    (dmask,) = torch.autograd.grad(out.sum(), mask, create_graph=True)
    assert dmask.shape == mask.shape
    assert torch.autograd.grad(dmask.sum(), q)[0].shape == q.shape
    for name in ("dense", "padded", "packed"):
        road, inputs = ROADS[name]
        tensors = inputs(torch.float32, "meta", requires_grad=True)
        (dq,) = torch.autograd.grad(road(*tensors).sum(), tensors[0], create_graph=True)
        assert torch.autograd.grad(dq.sum(), tensors[0])[0].shape == dq.shape
    q, k, v = dense_inputs(torch.float32, "meta")
    n = torch.empty(2, dtype=torch.int32, device="meta")
    for lengths in (None, n):
        call = lambda q, n=lengths: flashcore.attention(q, k, v, seqlens_k=n)
        assert torch.func.jvp(call, (q,), (q,))[1].shape == call(q).shape
        assert torch.func.grad(lambda q, c=call: c(q).sum())(q).shape == q.shape
    q, k, v = packed_inputs(torch.float32, "meta")
    call = lambda q: flashcore.attention_varlen(q, k, v, n, n, 3, 4, causal=True)
    assert torch.func.jvp(call, (q,), (q,))[1].shape == call(q).shape
    assert torch.func.hessian(lambda q: call(q).sum())(q).shape == (*q.shape, *q.shape)


def test_explain_says_that_there_are_no_values(capsys):
    q, k, v = dense_inputs(torch.float16, "meta")
    assert flashcore.explain(q, k, v).backend == "meta"
    assert "meta tensors, which have shapes and no values" in capsys.readouterr().out


def test_what_is_wrong_is_refused_as_for_real_tensors():
    q, k, v = dense_inputs(torch.float16, "meta")
    with pytest.raises(ValueError, match="v has seqlen 6 but k has 7"):
        flashcore.attention(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match=r"k is on cpu but q is on meta; move it"):
        flashcore.attention(q, torch.ones(2, 2, 7, 8, dtype=torch.float16), v)
    with pytest.raises(ValueError, match="scale=-1"):
        flashcore.attention(q, k, v, scale=-1)
