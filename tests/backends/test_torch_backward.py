"""Test gradients by torch's fused backward operators: which calls take them, and what they compute.

The operators need a GPU; here stands a model of each, by PyTorch, which takes the arguments as the
operators document them. So the CPU tests hold the translation: layouts, windows, lse, empty rows.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import flashcore
from flashcore.backends import gradients, torch_backward
from flashcore.backends.tiled import attention_backward_tiled, attention_tiled
from flashcore.checks.accuracy import torch_math_attention
from flashcore.checks.reference import attention_oracle
from flashcore.problem.options import Inputs, Options, Results

# seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v, options, mask, the code.
CASES = {
    "full": (65, 65, 2, 2, 64, 64, {}, None, "flash"),
    "grouped": (33, 70, 6, 2, 32, 32, {}, None, "flash"),
    "causal": (70, 70, 4, 1, 64, 64, {"causal": True}, None, "flash"),
    "lower-right": (33, 129, 2, 2, 72, 72, {"causal": True}, None, "flash"),
    "empty-rows": (129, 33, 2, 1, 128, 128, {"causal": True}, None, "flash"),
    "upper-left-long": (129, 65, 2, 2, 64, 64, {"causal": "upper_left"}, None, "flash"),
    "upper-left-short": (65, 129, 2, 1, 64, 64, {"causal": "upper_left"}, None, "efficient"),
    "window": (150, 150, 2, 2, 64, 64, {"causal": True, "window": (40, 0)}, None, "flash"),
    "window-both": (150, 90, 2, 1, 104, 104, {"window": (7, 9)}, None, "flash"),
    "window-right": (90, 150, 2, 2, 64, 64, {"window": (-1, 9)}, None, "flash"),
    "scale": (64, 64, 2, 2, 256, 256, {"scale": 0.3}, None, "flash"),
    "unequal": (65, 70, 4, 2, 64, 40, {}, None, "efficient"),
    "unequal-causal": (65, 70, 2, 2, 40, 128, {"causal": True}, None, "efficient"),
    "bool": (65, 71, 4, 2, 64, 64, {}, "bool", "efficient"),
    "bool-causal": (65, 65, 2, 2, 64, 64, {"causal": True}, "bool", "efficient"),
    "padding": (65, 71, 4, 2, 64, 64, {}, "padding", "efficient"),
    "bias": (65, 71, 2, 2, 64, 64, {}, "bias", "efficient"),
    "bias-of-keys": (64, 80, 4, 2, 64, 64, {}, "keys", "tiled"),
    "bias-of-batch": (64, 80, 4, 2, 64, 64, {}, "batch", "efficient"),
    "bias-float32": (65, 71, 2, 2, 64, 64, {}, "float32", "tiled"),
    "bias-window": (65, 71, 2, 2, 64, 64, {"window": (9, 9)}, "bias", "tiled"),
    "padded": (65, 65, 4, 2, 35, 35, {"causal": True}, None, "flash"),
    "padded-mask": (65, 71, 4, 2, 35, 50, {}, "bool", "efficient"),
    "softcap": (65, 71, 2, 2, 64, 64, {"softcap": 5.0}, None, "tiled"),
}
every_case = pytest.mark.parametrize("name", CASES)


def mask_of(kind, dtype, seqlen_q, seqlen_k, heads, generator):
    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if kind == "bool":
        mask = normal(2, heads, seqlen_q, seqlen_k) > -0.5
        mask[:, :, 3] = False
        return mask
    if kind == "padding":
        return (
            torch.arange(seqlen_k)[None, None, None] < torch.tensor([20, 71])[:, None, None, None]
        )
    if kind == "bias":
        return normal(2, heads, seqlen_q, seqlen_k).to(dtype)
    if kind == "batch":
        return normal(heads, seqlen_q, seqlen_k).to(dtype)
    if kind == "keys":
        return normal(heads, 1, seqlen_k).to(dtype)
    return normal(2, heads, seqlen_q, seqlen_k) if kind == "float32" else None


def inputs_of(name, dtype=torch.float16, device="cpu"):
    seqlen_q, seqlen_k, heads, heads_kv, dim, dim_v, options, kind, code = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    shapes = (2, heads, seqlen_q, dim), (2, heads_kv, seqlen_k, dim), (2, heads_kv, seqlen_k, dim_v)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    dout = torch.randn((*shapes[0][:3], dim_v), generator=generator).to(dtype)
    mask = mask_of(kind, dtype, seqlen_q, seqlen_k, heads, generator)
    tensors = [x if x is None else x.to(device) for x in (q, k, v, dout, mask)]
    return tensors, options, code


def described(q, k, v, mask, options):
    """Return the Problem as an A100 would have it, which has no fused backward of ours."""
    checked = Options.checked(
        options.get("causal", False), options.get("window"), options.get("softcap"),
        options.get("scale"),
    )  # fmt: skip
    problem = checked.problem(q, k, v, mask, return_lse=True)
    object.__setattr__(problem, "device", "cuda")
    object.__setattr__(problem, "arch", 80)
    return problem


def model_attention(q, k, v, bias, visible, lse, out, dout, scale):
    """Return dq, dk, dv and the scores' gradient in float64, as both operators compute them from
    lse."""
    group = q.shape[1] // k.shape[1]
    q, k, v, out, dout = (x.double() for x in (q, k, v, out, dout))
    k_all, v_all = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = q @ k_all.transpose(-1, -2) * scale
    if bias is not None:
        score = score + bias.double()
    score = score.masked_fill(~visible, -math.inf)
    weight = torch.exp(score - lse.double().unsqueeze(-1))
    delta = (dout * out).sum(-1, keepdim=True)
    dscore = weight * (dout @ v_all.transpose(-1, -2) - delta)
    dk = (dscore.transpose(-1, -2) @ q * scale).unflatten(1, (-1, group)).sum(2)
    dv = (weight.transpose(-1, -2) @ dout).unflatten(1, (-1, group)).sum(2)
    return dscore @ k_all * scale, dk, dv, dscore


def band(seqlen_q, seqlen_k, left, right, shift):
    distance = torch.arange(seqlen_k)[None] - torch.arange(seqlen_q)[:, None] - shift
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


def model_flash(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, state, unused, *,
    scale, window_size_left, window_size_right,
):  # fmt: skip
    assert dropout_p == 0.0
    assert not (is_causal and window_size_left is not None)
    assert lse.is_contiguous()
    if cu_q is None:
        parts = [(slice(None), slice(None))]
        lse = lse.transpose(1, 2)
    else:
        rows, keys = ([slice(*p) for p in itertools.pairwise(cu.tolist())] for cu in (cu_q, cu_k))
        parts = list(zip(rows, keys, strict=True))
        assert max(p.stop - p.start for p, _ in parts) <= max_q
        dout, q, k, v, out, lse = (x.unsqueeze(0) for x in (dout, q, k, v, out, lse.t()))
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    for rows, keys in parts:
        tensors = q[:, rows], k[:, keys], v[:, keys]
        q_, k_, v_, out_, dout_ = (
            x.transpose(1, 2) for x in (*tensors, out[:, rows], dout[:, rows])
        )
        visible = band(
            q_.shape[2], k_.shape[2], window_size_left,
            0 if is_causal else window_size_right, k_.shape[2] - q_.shape[2],
        )  # fmt: skip
        part = model_attention(
            q_, k_, v_, None, visible, lse[:, rows].transpose(1, 2), out_, dout_, scale
        )
        for gradient, own, where in zip(grads, part, (rows, keys, keys), strict=False):
            gradient[:, where] = own.transpose(1, 2).to(gradient.dtype)
    return tuple(grads) if cu_q is None else tuple(x[0] for x in grads)


def model_efficient(
    dout, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout_p, seed, offset, mask_type,
    wants_bias, *, scale,
):  # fmt: skip
    assert dropout_p == 0.0
    assert lse.shape[2] % 32 == 0
    assert out.is_contiguous()  # it is read without its strides
    assert q.shape[2] == k.shape[2]
    if bias is not None:
        assert bias.dtype == q.dtype
        assert bias.stride(3) == 1
        assert bias.stride(2) % 8 == 0
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    shift = seqlen_k - seqlen_q if mask_type == 2 else 0
    visible = band(seqlen_q, seqlen_k, None, 0 if mask_type else None, shift)
    tensors = (x.transpose(1, 2) for x in (q, k, v))
    *grads, dbias = model_attention(
        *tensors,
        bias,
        visible,
        lse[..., :seqlen_q],
        out.transpose(1, 2),
        dout.transpose(1, 2),
        scale,
    )
    dq, dk, dv = (g.transpose(1, 2).to(q.dtype).contiguous() for g in grads)
    return dq, dk, dv, dbias.to(q.dtype) if wants_bias else None


@pytest.fixture
def modelled(monkeypatch):
    monkeypatch.setattr(torch_backward, "_flash_operator", model_flash)
    monkeypatch.setattr(torch_backward, "_efficient_operator", model_efficient)


def limits(q, k, v, mask, dout, options):
    """Return True gradients, and by the error rule how far from them a result may be."""
    wide = [None if x is None else x.detach().cpu() for x in (q, k, v, mask)]

    def grads(function, dtype):
        leaves = [
            x if x is None or x.dtype == torch.bool else x.to(dtype).requires_grad_() for x in wide
        ]
        *qkv, own_mask = leaves
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        out = function(*qkv, mask=own_mask, **options)
        return torch.autograd.grad(out, wanted, dout.cpu().to(out.dtype))

    true = grads(lambda *a, **o: attention_oracle(*a, **o)[0], torch.float64)
    plain = grads(torch_math_attention, q.dtype)
    return [(t, 2 * (p - t).abs().max() + 1e-5) for t, p in zip(true, plain, strict=True)]


@every_case
def test_operators_are_called_so_that_they_mean_the_same(name, modelled):
    (q, k, v, dout, mask), options, code = inputs_of(name)
    problem = described(q, k, v, mask, options)
    wants_mask = mask is not None and mask.dtype != torch.bool
    elements = mask.numel() if wants_mask else 0
    choice = gradients.choose_backward(problem, mask_grad_elements=elements)
    assert choice.code == code, choice.reason
    out, lse = attention_tiled(problem, q, k, v, mask)
    dout_in = dout.masked_fill((lse == -math.inf).unsqueeze(-1), math.nan)
    found = gradients.attention_gradients(
        problem, q, k, v, mask, out, lse, dout_in, None, wants_mask
    )
    want = limits(q, k, v, mask, dout, options)
    for gradient, x, (true, limit) in zip(found, (q, k, v, mask), want, strict=False):
        assert gradient.dtype == x.dtype
        assert gradient.stride() == torch.empty_like(x).stride()
        assert (gradient - true).abs().max() <= limit


def test_a_small_broadcast_mask_is_not_stored_whole():
    (q, k, v, _, _), options, _ = inputs_of("full")
    problem = described(q, k, v, torch.zeros(65, dtype=q.dtype), options)
    choice = gradients.choose_backward(problem, mask_grad_elements=65)
    assert choice.code == "tiled"
    assert "broadcast" in choice.reason
    assert gradients.choose_backward(problem).code == "efficient"


def test_a_gradient_of_lse_goes_by_tiles():
    (q, k, v, _, _), options, _ = inputs_of("full")
    choice = gradients.choose_backward(described(q, k, v, None, options), through_lse=True)
    assert choice.code == "tiled"
    assert "lse" in choice.reason


PACKED = {
    "full": ([0, 30, 30, 95], [0, 40, 70, 90], {}),
    "causal": ([0, 30, 65, 95], [0, 40, 60, 95], {"causal": True}),
    "window": ([0, 30, 65, 95], [0, 40, 60, 95], {"window": (9, 3)}),
    "outside": ([0, 30, 30, 80], [0, 40, 70, 90], {"causal": True}),  # rows behind the last
}


def packed_inputs(name, device="cpu", dtype=torch.float16):
    generator = torch.Generator().manual_seed(3)
    shapes = (100, 4, 64), (100, 2, 64), (100, 2, 64), (100, 4, 64)
    tensors = [torch.randn(s, generator=generator).to(device=device, dtype=dtype) for s in shapes]
    cu_q, cu_k, options = PACKED[name]
    return (
        tensors,
        *(torch.tensor(cu, dtype=torch.int32, device=device) for cu in (cu_q, cu_k)),
        options,
    )


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_in_one_operator(name, modelled):
    from flashcore.backends import packed

    (q, k, v, dout), cu_q, cu_k, options = packed_inputs(name)
    problem = packed.packed_problem(
        q, k, v, cu_q, cu_k, 80, 80, causal=options.get("causal", False), scale=None,
        window=options.get("window"), softcap=None,
    )  # fmt: skip
    inputs = Inputs(q, k, v, None, None, cu_q, cu_k, 80, 80)
    results = packed.run_packed("torch", problem, inputs)
    arriving = Results(dout, None)
    want = packed.packed_backward(problem, arriving, inputs, results)
    object.__setattr__(problem, "device", "cuda")
    object.__setattr__(problem, "arch", 80)
    found = packed.packed_backward(problem, arriving, inputs, results)
    for gradient, expected in zip(found, want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ours", [False, True])
def test_gradients_on_a_gpu(name, dtype, ours, monkeypatch):
    if not ours:
        monkeypatch.setattr(gradients, "obstacle_to_sm90", lambda *_: "switched off")
    (q, k, v, dout, mask), options, _ = inputs_of(name, dtype, "cuda")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().requires_grad_()
        leaves.append(mask)
    out, lse = flashcore.attention(*leaves[:3], mask=mask, return_lse=True, **options)
    dout_in = dout.masked_fill((lse == -math.inf).unsqueeze(-1), math.nan)
    found = torch.autograd.grad(out, leaves, dout_in)
    for gradient, (true, limit) in zip(found, limits(q, k, v, mask, dout, options), strict=True):
        assert (gradient.cpu() - true).abs().max() <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
def test_packed_gradients_on_a_gpu(name):
    (q, k, v, dout), cu_q, cu_k, options = packed_inputs(name, "cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flashcore.attention_varlen(*leaves, cu_q, cu_k, 80, 80, **options)
    found = torch.autograd.grad(out, leaves, dout)
    leaves = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    out = flashcore.attention_varlen(*leaves, cu_q.cpu(), cu_k.cpu(), 80, 80, **options)
    for gradient, expected in zip(found, torch.autograd.grad(out, leaves, dout.cpu()), strict=True):
        torch.testing.assert_close(gradient.cpu(), expected, rtol=4e-3, atol=4e-3)


@pytest.mark.gpu
def test_a_compiled_training_step_takes_them():
    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def step(*tensors):
        leaves = [x.detach().transpose(1, 2).requires_grad_() for x in tensors]
        return torch.autograd.grad(flashcore.attention(*leaves, causal=True).float().sum(), leaves)

    for got, want in zip(torch.compile(step)(q, k, v), step(q, k, v), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-2)


def test_tiles_are_what_remains():
    """The models above and the tiles agree, so a wrong model would show."""
    (q, k, v, dout, _), options, _ = inputs_of("grouped")
    problem = described(q, k, v, None, options)
    out, lse = attention_tiled(problem, q, k, v, None)
    tiles = attention_backward_tiled(problem, q, k, v, None, out, lse, dout, None, False)
    visible = torch.ones(33, 70, dtype=torch.bool)
    model = model_attention(q, k, v, None, visible, lse, out, dout, problem.scale)
    for a, b in zip(tiles[:3], model[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3)
