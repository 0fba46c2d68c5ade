"""Test attention as an operator: opcheck, torch.compile, torch.export."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from op_inputs import additive_mask, as_arguments, compiled, gradients, qkv
from parameters import thorough_but
from roads import dense_inputs, lengths, packed_inputs

import flashcore
from flashcore.ops import dense as ops

OPTIONS = {
    "plain": {},
    "causal, window": {"causal": True, "window": (3, 0)},
    "upper left, right window": {"causal": "upper_left", "window": (-1, 2)},
    "softcap, scale": {"softcap": 2.0, "scale": 0.3},
}


@pytest.mark.parametrize("name", thorough_but(["causal, window"], OPTIONS))
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_opcheck_of_the_forward(name, mask):
    """Schema, fake results (strides too), autograd; the whole under AOT dispatch once per mask."""
    q, k, v = qkv(requires_grad=True)
    masks = {
        None: None,
        "bool": additive_mask(2, 1, 6, 9) > 0,
        "additive": additive_mask(9, 6, requires_grad=True).mT,
    }
    for return_lse in (True, False):
        wanted = ops.Wanted(return_lse, return_max_score=not return_lse)
        arguments = (q, k, v, masks[mask], None, *as_arguments(OPTIONS[name]), *wanted, "auto")
        torch.library.opcheck(ops.forward, arguments, test_utils=_checks(name == "softcap, scale"))


@pytest.mark.parametrize("layout", ["bshd", "expanded", "float16", "float64", "empty", "inference"])
def test_opcheck_of_layouts_and_dtypes(layout):
    q, k, v = qkv(0 if layout == "empty" else 6, requires_grad=layout != "inference")
    if layout == "bshd":
        q, k, v = (x.detach().mT.reshape(*x.shape).transpose(1, 2) for x in qkv(4, 4))
        q, k, v = (x.contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    elif layout == "expanded":
        k, v = (x.detach()[:1].expand(2, -1, -1, -1).requires_grad_() for x in (k, v))
    elif layout.startswith("float"):
        dtype = getattr(torch, layout)
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    torch.library.opcheck(
        ops.forward,
        (q, k, v, None, None, *as_arguments({}), *ops.Wanted(True), "torch"),
        test_utils=_checks(False),
    )
    torch.library.opcheck(
        ops.forward,
        (q, k, v, None, None, *as_arguments({}), *ops.Wanted(), "auto"),
        test_utils=_checks(False),
    )


def _is_traced(given, name):
    return (given, name) == ("both", "softcap, scale")


@pytest.mark.parametrize(
    ("given", "name"),
    [  # AOT dispatch takes eight seconds
        pytest.param(given, name, marks=pytest.mark.thorough if _is_traced(given, name) else ())
        for given, name in itertools.product(("both", "only dout", "only dlse"), OPTIONS)
    ],
)
def test_opcheck_of_the_backward(given, name):
    q, k, v = qkv(requires_grad=True)
    mask = additive_mask(6, 9, requires_grad=True)
    options = as_arguments(OPTIONS[name])
    results = ops.forward(q, k, v, mask, None, *options, *ops.Wanted(True), "auto")
    out, lse, _ = (x.detach() for x in results)
    dout = None if given == "only dlse" else torch.ones_like(out).requires_grad_()
    dlse = None if given == "only dout" else torch.ones_like(lse).requires_grad_()
    # Empty rows have lse -inf, and opcheck's comparison of -inf with itself is NaN.
    lse = lse.clamp(min=-1e30)
    arguments = (dout, dlse, q, k, v, mask, None, out, lse, *options, True, False, "auto")
    torch.library.opcheck(ops.backward, arguments, test_utils=_checks(_is_traced(given, name)))


def _checks(all_of_them):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    return (*checks, "test_aot_dispatch_dynamic") if all_of_them else checks


@pytest.mark.parametrize("requires_grad", thorough_but([True], [False, True]))
def test_one_compilation_serves_all_lengths(requires_grad):
    def function(q, k, v, mask):
        x = flashcore.attention(q * 2.0, k, v, causal=True, window=(5, 0), softcap=3.0, scale=0.3)
        y, lse = flashcore.attention(
            q, k, v, mask=mask[None, None], window=(q.shape[2] // 2, 1), return_lse=True
        )
        return x + y, lse

    fast, counter = compiled(function, dynamic=True)
    for seqlen in (6, 7, 9, 33, 130):
        q, k, v = qkv(seqlen, seqlen + 4, requires_grad=requires_grad)
        mask = additive_mask(seqlen, seqlen + 4)
        torch.testing.assert_close(fast(q, k, v, mask), function(q, k, v, mask))
    assert counter.frame_count == 1
    if requires_grad:
        mask.requires_grad_()
        torch.testing.assert_close(
            gradients(fast, q, k, v, mask), gradients(function, q, k, v, mask)
        )


def test_lengths_become_dynamic_by_themselves():
    fast, counter = compiled(lambda q, k, v: flashcore.attention(q, k, v, causal="upper_left"))
    for seqlen in (6, 7, 9, 33, 130):
        fast(*qkv(seqlen, seqlen + 4))
    assert counter.frame_count == 2


@pytest.mark.thorough
def test_inductor_keeps_layouts_that_the_operator_needs():
    """head_dim stays contiguous, an expanded mask expanded, though both come from fused code."""

    def function(q, k, v, mask):
        q = (q + 1.0).transpose(1, 2).contiguous().transpose(1, 2)
        mask = (mask + 1.0)[None, None].expand(2, 4, -1, -1)
        return flashcore.attention(q, k, v, mask=mask).relu()

    fast, _ = compiled(function, "inductor")
    tensors = (*qkv(requires_grad=True), additive_mask(6, 9, requires_grad=True))
    torch.testing.assert_close(fast(*tensors), function(*tensors))
    torch.testing.assert_close(gradients(fast, *tensors), gradients(function, *tensors))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k, v: (q, k.double(), v), "k has dtype torch.float64"),
        (lambda q, k, v: (q, k[0], v), "k has 3 dimensions"),
        (lambda q, k, v: (q, k[:, :, 1:], v), "v has seqlen 9 but k has 8"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v), "q has head_dim 0"),
    ],
)
def test_bad_tensors_are_named_in_compiled_code_too(change, text):
    fast, _ = compiled(flashcore.attention, dynamic=True)
    with pytest.raises(Exception, match=text):
        fast(*change(*qkv()))


class Module(torch.nn.Module):
    def forward(self, q, k, v):
        return flashcore.attention(q, k, v, causal=True, window=(4, 0))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    lengths = {2: torch.export.Dim("seqlen", min=2, max=4096)}
    dynamic = (lengths, lengths, lengths)
    program = torch.export.export(Module(), qkv(6, 6), dynamic_shapes=dynamic, strict=strict)
    assert [n.target for n in program.graph.nodes if "attention" in str(n.target)] == [ops.forward]
    tensors = qkv(50, 50)
    torch.testing.assert_close(program.module()(*tensors), Module()(*tensors))


@pytest.mark.parametrize(
    ("mask", "operator"),
    [
        pytest.param(
            *pair,
            marks=() if pair == ("bool", "padded") else pytest.mark.thorough,
        )
        for pair in itertools.product((None, "bool", "additive"), ("padded", "varlen"))
    ],
)
def test_opcheck_of_the_operators_that_take_lengths(mask, operator):
    """Schema, fakes and autograd, forward and backward; and under AOT dispatch with options."""
    options = as_arguments(OPTIONS["softcap, scale"] if mask else OPTIONS["causal, window"])
    if operator == "varlen":
        if mask is not None:
            pytest.skip("packed sequences have no mask")
        tensors = (*packed_inputs(torch.float32, requires_grad=True), *lengths("cpu"), 3, 4, None)
    else:
        q, k, v = dense_inputs(torch.float32, requires_grad=True)
        masks = {None: None, "bool": torch.ones(5, 7) > 0, "additive": additive_mask(5, 1)}
        tensors = (q, k, v, masks[mask], torch.tensor([5, 2], dtype=torch.int32))
        tensors = (*tensors, None, None, None, None)  # sinks, scales, tree
    forward = getattr(torch.ops.flashcore, f"attention_{operator}_forward").default
    backward = getattr(torch.ops.flashcore, f"attention_{operator}_backward").default
    traced = mask != "bool"
    arguments = (*tensors, *options, *ops.Wanted(True, True), "torch")
    torch.library.opcheck(forward, arguments, test_utils=_checks(traced))
    out, lse, _ = forward(*arguments)
    # Empty rows have lse -inf, and opcheck's comparison of -inf with itself is NaN.
    out, lse = out.detach(), lse.detach().clamp(min=-1e30)
    for dout, dlse in ((torch.ones_like(out), None), (None, torch.ones_like(lse))):
        gradients_of = (dout, dlse, *tensors, out, lse, *options, False, "torch")
        traced = mask is None and dlse is None
        torch.library.opcheck(backward, gradients_of, test_utils=_checks(traced))


class Packed(torch.nn.Module):
    def forward(self, q, k, v, cu_q, cu_k):
        return flashcore.attention_varlen(q, k, v, cu_q, cu_k, 3, 4, causal=True)


class Padded(torch.nn.Module):
    def forward(self, q, k, v, seqlens_k):
        return flashcore.attention(q, k, v, seqlens_k=seqlens_k, causal=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_calls_with_lengths(strict):
    q, k, v = packed_inputs(torch.float32)
    total_q, total_k, ends = (torch.export.Dim(name, min=2, max=4096) for name in ("q", "k", "n"))
    dynamic = ({0: total_q}, {0: total_k}, {0: total_k}, {0: ends}, {0: ends})
    program = torch.export.export(
        Packed(), (q, k, v, *lengths("cpu")), dynamic_shapes=dynamic, strict=strict
    )
    cu = torch.tensor([0, 2, 3], dtype=torch.int32)
    for arguments in ((q, k, v, *lengths("cpu")), (q[:3], k[:5], v[:5], cu, cu)):
        torch.testing.assert_close(program.module()(*arguments), Packed()(*arguments))
    tensors = dense_inputs(torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Padded(),
        (*tensors, torch.tensor([7, 3], dtype=torch.int32)),
        dynamic_shapes=({0: batch},) * 4,
        strict=strict,
    )
    more = (*(torch.cat([x, x]) for x in tensors), torch.tensor([1, 7, 0, 5], dtype=torch.int32))
    torch.testing.assert_close(program.module()(*more), Padded()(*more))
